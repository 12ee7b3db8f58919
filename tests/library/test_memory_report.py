"""Memory, read from the compiler: the bounds that make unrolling affordable. Nothing runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Unroll, memory_report

RATE = 0.1


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


WEIGHTS = {"a": shape(784, 512), "b": shape(512, 512), "c": shape(512, 10)}


def cross_entropy(w, lam, batch):
    x, y = batch
    x = jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"])
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(x @ w["c"]), -1))


def decayed(w, lam, batch):
    """One decay a weight."""
    penalty = sum(jnp.sum(jnp.exp(lam[k]) * w[k] ** 2) for k in w)
    return cross_entropy(w, lam, batch) + jnp.float32(0.5) * penalty


def batches(*lead):
    return (shape(*lead, 256, 784), shape(*lead, 256, 10))


def temporary(response, steps):
    report = memory_report(
        cross_entropy, decayed, {"one": response}, WEIGHTS, WEIGHTS,
        inner_batch=batches(steps), outer_batch=batches(),
    )  # fmt: skip
    return report.row("one").temp


def reverse_over_reverse(steps):
    """What one writes by hand: jax.grad through a scan of jax.grad, batches as its inputs."""

    def value(lam, w, inner_batches, outer_batch):
        def step(w, batch):
            grads = jax.grad(decayed)(w, lam, batch)
            return jax.tree.map(lambda x, g: x - jnp.float32(RATE) * g, w, grads), None

        w, _ = jax.lax.scan(step, w, inner_batches)
        return cross_entropy(w, lam, outer_batch), w

    call = jax.jit(jax.value_and_grad(value, has_aux=True))
    compiled = call.lower(WEIGHTS, WEIGHTS, batches(steps), batches()).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_fifty_steps_on_670k_weights():
    plain = reverse_over_reverse(50)
    mixed = temporary(Unroll(optax.sgd(RATE), 50), 50)
    assert mixed <= 0.31 * plain
    assert temporary(Unroll(optax.sgd(RATE), 50, truncate=10), 50) <= 0.31 * mixed
    assert temporary(Unroll(optax.sgd(RATE), 50, remat="sqrt"), 50) <= 0.14 * plain


def test_memory_of_segments_grows_like_the_square_root():
    """Affine in sqrt(steps): from 10 to 20 segments costs twice what 5 to 10 does."""
    sizes = [temporary(Unroll(optax.sgd(RATE), t, remat="sqrt"), t) for t in (25, 100, 400)]
    growth = (sizes[2] - sizes[1]) / (sizes[1] - sizes[0])
    assert 1.9 <= growth <= 2.1  # linear growth would make it 4
    assert sizes[2] <= 4 * sizes[0]  # 16 times the steps


def test_forward_memory_does_not_depend_on_steps():
    def size(steps):
        response = Unroll(lambda lam: optax.sgd(lam), steps, mode="forward")
        report = memory_report(
            cross_entropy, cross_entropy, {"one": response}, WEIGHTS, shape(),
            inner_batch=batches(steps), outer_batch=batches(),
        )  # fmt: skip
        return report.row("one").temp

    assert size(40) <= 1.01 * size(4)


def test_report_of_all_modes():
    def loss(w, lam, batch):
        return jnp.mean((batch @ w) ** 2) + jnp.exp(lam) * jnp.sum(w**2)

    report = memory_report(
        loss, loss, Unroll(optax.sgd(RATE), 6), shape(3), shape(),
        inner_batch=shape(6, 5, 3), outer_batch=shape(5, 3),
    )  # fmt: skip
    assert [row.name for row in report.rows] == [
        "mixed", "mixed, remat=step", "mixed, remat=sqrt", "mixed, remat=log",
        "reverse", "reverse, remat=step", "reverse, remat=sqrt", "reverse, remat=log",
        "forward",
    ]  # fmt: skip
    for row in report.rows:
        assert row.arguments == 4 * (6 * 5 * 3 + 5 * 3 + 3 + 1)
        assert row.temp >= 0 and row.outputs > 0
        assert row.peak == row.temp + row.arguments + row.outputs
    text = str(report)
    assert all(row.compile_seconds > 0 for row in report.rows) and "compile s" in text
    assert len(text.splitlines()) == 10 and "mixed, remat=sqrt" in text and "MiB" in text
    with pytest.raises(KeyError, match="no row 'mixd'"):
        report.row("mixd")


def test_report_leaves_out_forward_above_its_limit_and_takes_any_response():
    def loss(w, lam, batch):
        return jnp.sum((w * batch) ** 2) + jnp.sum(jnp.exp(lam) * w**2)

    response = Unroll(optax.sgd(RATE), 2, max_hparams=2)
    report = memory_report(
        loss, loss, response, np.ones(3, np.float32), np.ones(3, np.float32),
        inner_batch=shape(2, 3), outer_batch=shape(3),
    )  # fmt: skip
    assert "forward" not in [row.name for row in report.rows]
    assert "more than max_hparams=2" in str(report)
    implicit = memory_report(
        loss, loss, bilevel.Implicit(), shape(3), shape(3),
        inner_batch=shape(3), outer_batch=shape(3),
    )  # fmt: skip
    assert [row.name for row in implicit.rows] == ["Implicit"]
    with pytest.raises(ValueError, match="leading axis of 2"):
        memory_report(
            loss, loss, response, shape(3), shape(3), inner_batch=shape(1, 3), outer_batch=shape(3)
        )
