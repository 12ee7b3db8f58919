"""`hyperlista` in miniature: what its iteration is without its parts, and that it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.hyperlista import config, figure, problem, run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("hyperlista")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        run.run(config.smoke(), 0, out, resume=False)
    return out


def test_it_runs_and_recovers(out):
    records = record.read(out)
    last = record.final(records)
    for method in figure.METHODS:
        assert last[method, 0].metrics["nmse_db"] < 0
    told = run.summary(records)
    assert told["hyperlista_less_retuned"]["seeds"] == 1
    assert all(path.exists() for path in figure.figures(out))


def test_weights_of_the_dictionary_are_incoherent():
    d = problem.dictionary(config.smoke(), 3)
    product = np.asarray(d.w).T @ np.asarray(d.a)
    np.testing.assert_allclose(np.diag(product), 1, rtol=1e-5)
    gram = np.asarray(d.a).T @ np.asarray(d.a)
    assert np.linalg.norm(product) < np.linalg.norm(gram)


def test_without_momentum_and_selection_it_is_ista():
    """With W = A and a threshold that follows the residual, step by step."""
    settings = config.smoke()
    d = problem.dictionary(settings, 0)
    d = d._replace(w=d.a)
    with jax.numpy_rank_promotion("allow"):
        step, _ = problem.hyperlista(d, None)
        _, seen = problem.draw(jax.random.key(1), d.a, 5, 0.1)
        lam = {"threshold": jnp.log(0.02), "momentum": -jnp.inf, "selected": -jnp.inf}
        state = problem.start(run.blank(settings, 5), lam, seen)
        x = np.zeros((5, settings.codes))
        for t in range(4):
            state = step(state, lam, seen, t)
            residual = x @ np.asarray(d.a).T - np.asarray(seen)
            left = np.abs(residual @ np.asarray(d.inverse).T).sum(1, keepdims=True)
            v = x - residual @ np.asarray(d.a)
            x = np.sign(v) * np.maximum(np.abs(v) - 0.02 * left, 0)
            np.testing.assert_allclose(state.now, x, rtol=1e-3, atol=1e-4)
