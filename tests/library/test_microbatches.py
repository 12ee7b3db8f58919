"""Losses read in micro-batches: the same numbers, in the memory of one part."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Hessian, Implicit, Unroll, accumulate
from bilevel.problem.two_losses import Problem

KEYS = jax.random.split(jax.random.key(0), 4)
X, Y = jax.random.normal(KEYS[0], (12, 3)), jax.random.normal(KEYS[1], (12,))
W = {"a": jax.random.normal(KEYS[2], (3, 4)), "b": jnp.ones(4)}
LAM = {"decay": jnp.float64(-1.0), "labels": 0.1 * jnp.ones(())}
BATCH = {"x": X, "y": Y, "shift": jnp.float64(0.2)}


def loss(w, lam, batch):
    out = jnp.tanh(batch["x"] @ w["a"]) @ w["b"]
    fit = jnp.mean((out - batch["y"] - lam["labels"] * batch["shift"]) ** 2)
    return fit + jnp.exp(lam["decay"]) * optax.tree.norm(w, squared=True)


PARTS = accumulate(loss, 4)


def everything(train):
    """Value, gradients, products, a solve, an unrolled run, and the derivative in the data."""
    problem = Problem(loss, train)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    call = dict(outer_batch=BATCH)
    return (
        jax.value_and_grad(train, argnums=(0, 1))(W, LAM, BATCH),
        jax.grad(lambda x: train(W, LAM, BATCH | {"x": x}))(X),
        problem.products(W, LAM, BATCH, W),
        bilevel.hypergrad(loss, train, Implicit(CG(5), Hessian(1.0)))(
            W, LAM, inner_batch=BATCH, **call
        ),
        bilevel.hypergrad(train, train, Unroll(optax.adam(0.1), 2))(
            W, LAM, inner_batch=stack, **call
        ),
        bilevel.hypergrad(loss, train, Unroll(optax.sgd(0.1), 2, mode="forward"))(
            W, LAM, inner_batch=stack, **call
        ),
    )


def test_parts_give_what_the_full_batch_gives():
    found, want = jax.jit(lambda: (everything(PARTS), everything(loss)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, want)


def test_a_loop_reads_micro_batches():
    def run(train):
        alg = bilevel.alternate(
            train, train, Implicit(CG(3), Hessian(1.0)), optax.sgd(0.1), optax.sgd(0.1),
            inner_steps=2,
        )  # fmt: skip
        stack = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
        state, _ = alg.step(alg.init(W, LAM), inner_batches=stack, outer_batch=BATCH)
        return state.params, state.hparams

    found, want = jax.jit(lambda: (run(PARTS), run(loss)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, want)


def test_memory_of_a_product_is_that_of_one_part():
    shape = jax.ShapeDtypeStruct
    params = [shape((64, 64), jnp.float32)] * 3
    batch = shape((4096, 64), jnp.float32)

    def deep(w, lam, x):
        for kernel in w:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def temporary(train):
        product = jax.jit(lambda w, x, v: Problem(train, train).hvp(w, jnp.float32(0.0), x, v))
        return product.lower(params, batch, params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(accumulate(deep, 8)) < 0.25 * temporary(deep)


def test_keys_differ_between_parts():
    def noise(w, lam, batch):
        return w * jax.random.normal(batch["key"]) + 0 * jnp.mean(batch["x"])

    found = jax.grad(accumulate(noise, 3))(1.0, 0.0, {"x": X, "key": KEYS[3]})
    want = np.mean([jax.random.normal(jax.random.fold_in(KEYS[3], i)) for i in range(3)])
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"\['x'\] has 12 examples, which 5 micro-batches do not"):
        accumulate(loss, 5)(W, LAM, BATCH)
    with pytest.raises(ValueError, match="this batch has none"):
        accumulate(lambda w, lam, batch: w, 2)(1.0, 0.0, jnp.float32(1))
    with pytest.raises(ValueError, match="`parts` must be at least 1"):
        accumulate(loss, 0)
