"""The language model of `lstm`: its text, its noise with a derivative, and that it runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import data, record
from experiments.lstm import config, corpus, figure, problem, run

SMALL = dataclasses.replace(
    config.smoke(),
    sizes=(1_000, 600, 600),
    units=8,
    steps=8,
    budget=60.0,
    points=3,
    trial_budget=40.0,
)


@pytest.fixture(autouse=True)
def defaults():
    """What those who run the experiment have: float32 and broadcasting."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def test_rare_words_become_one_unknown_word(monkeypatch):
    words = ("a", "<unk>", "b", "c")
    part = np.array([0, 0, 2, 1, 0, 3, 2, 0], np.int32)
    monkeypatch.setattr(data, "ptb", lambda: data.Tokens(part, part, part, words))
    cut = corpus.load("ptb", 2, (5, 8, None))
    # In the five tokens that are kept, "a" is the most frequent: it stays, all else is unknown.
    assert cut.train.tolist() == [1, 1, 0, 0, 1]
    assert cut.test.tolist() == [1, 1, 0, 0, 1, 0, 0, 1]
    assert corpus.streams(cut.test, 3).tolist() == [[1, 1], [0, 0], [1, 0]]


def test_noise_has_the_moments_of_dropout_and_a_derivative():
    key, rate = jax.random.key(0), jnp.float32(0.3)
    noise = problem.factors(key, (200, 500), rate)
    np.testing.assert_allclose(noise[:100] + noise[100:], 2.0, rtol=1e-6)  # mirrored
    # 50000 independent draws: the relative error of a variance is about sqrt(2 / 50000) = 0.6 %.
    assert float(jnp.var(noise)) == pytest.approx(0.3 / 0.7, rel=0.03)

    def square(r):
        return jnp.mean(problem.factors(key, (200, 500), r) ** 2)

    # d/dr of 1 + r / (1 - r), to the same sampling error.
    assert float(jax.grad(square)(rate)) == pytest.approx(1 / 0.7**2, rel=0.03)


def test_many_start_where_few_start_and_reach_every_weight():
    params = problem.initial(SMALL, 50, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 9), 0, 50)
    batch = {"x": tokens[:, :-1], "y": tokens[:, 1:], "rows": jnp.arange(8)}
    batch["key"] = jax.random.key(2)
    carry = problem.zero_carry(SMALL, 8)

    @jax.jit
    def loss(hparams):
        return problem.inner(SMALL, params, hparams, batch, carry)[0]

    few, many = (problem.hparams(SMALL, params, many) for many in (False, True))
    assert float(loss(few)) == pytest.approx(float(loss(many)), rel=1e-6)
    grads = jax.jit(jax.grad(loss))(many)["own"]
    kernel = params["lstm_0"]["recurrent"]
    low, high = SMALL.decays
    # The derivative of e^(log decay) w^2 / 2, and of the log decay in its raw variable.
    slope = (SMALL.decay - low) * (high - SMALL.decay) / (high - low)
    expected = 0.5 * math.exp(SMALL.decay) * kernel**2 * slope
    # Offsets have mean zero, so their gradient has too: float32 loses digits to that difference.
    expected = np.asarray(expected - expected.mean())
    found = grads["decays"]["['lstm_0']['recurrent']"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # Only words that occur have a rate that matters; all others share what the mean takes away.
    seen = np.isin(np.arange(50), np.asarray(batch["x"]))
    words = np.asarray(grads["rates"]["words"])
    assert 0 < seen.sum() < 50
    np.testing.assert_allclose(words[~seen], words[~seen][0], rtol=1e-5)
    assert np.all(np.abs(words[seen] / words[~seen][0] - 1) > 1e-3)


def test_a_small_run_learns_records_everything_and_is_not_repeated(tmp_path):
    run.run(SMALL, 0, tmp_path, resume=False)
    before = (tmp_path / record.FILE).read_bytes()
    run.run(SMALL, 0, tmp_path, resume=True)
    assert (tmp_path / record.FILE).read_bytes() == before
    for method in run.METHODS:
        last = record.read(tmp_path, method=f"markov_{method}")[-1]
        assert last.cost <= max(SMALL.budget, SMALL.trials * SMALL.trial_budget)
        assert last.metrics["validation_perplexity"] < 48  # 50 words; below that it has learned
        assert math.isfinite(last.metrics["test_perplexity"])
    moved = record.load_arrays(tmp_path, "markov_many_0")["rates_words"]
    assert np.ptp(moved) > 1e-3
    assert all(path.exists() for path in figure.figures(tmp_path))
