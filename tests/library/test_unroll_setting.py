"""`unroll=`: every loop over steps is written out, or stays a loop, as is asked for."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel
from bilevel import BestResponse, Evolution, StructuredResponse, Unroll
from bilevel.inner.hypernetwork import Hypernetwork

KEY = jax.random.key(0)
W, LAM = jnp.ones((2, 3)), jnp.zeros(())
TX = optax.sgd(0.1)


def train(w, lam, batch):
    return jnp.mean((batch @ w) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def valid(w, lam, batch):
    return jnp.mean((batch @ w - 1) ** 2)


BATCH = jnp.ones((4, 2))
STACK = jnp.ones((3, 4, 2))


def gradient(response, batch):
    return jax.make_jaxpr(
        lambda w: bilevel.hypergrad(valid, train, response)(
            w, LAM, inner_batch=batch, outer_batch=BATCH, key=KEY
        )
    )(W)


def step(loop):
    state = loop.init(W, LAM)
    return jax.make_jaxpr(
        lambda s: loop.step(s, inner_batches=STACK, outer_batch=BATCH, key=KEY)[0].params
    )(state)


def around(key, lam):
    return lam + 0.1 * jax.random.normal(key)


PROGRAMS = {
    "Unroll": lambda u: gradient(Unroll(TX, 3, unroll=u), STACK),
    "Evolution": lambda u: gradient(Evolution(TX, 3, 2, 0.1, unroll=u), STACK),
    "BestResponse": lambda u: gradient(
        BestResponse(StructuredResponse(), TX, steps=3, unroll=u), BATCH
    ),
    "accumulate": lambda u: jax.make_jaxpr(
        jax.grad(bilevel.accumulate(train, 2, unroll=u))
    )(W, LAM, BATCH),
    "alternate": lambda u: step(
        bilevel.alternate(
            valid, train, bilevel.Implicit(bilevel.Identity()), TX, TX, inner_steps=3, unroll=u
        )
    ),
    "self_tuning": lambda u: step(
        bilevel.self_tuning(valid, train, TX, TX, inner_steps=3, groups=1, unroll=u)
    ),
    "global_response": lambda u: step(
        bilevel.global_response(
            valid, train, Hypernetwork((4,)), around, TX, TX, inner_steps=3, unroll=u
        )
    ),
}  # fmt: skip


def loops(jaxpr):
    """How many loops the program has; a scan that is written out is one by name alone."""
    return len(re.findall(r" while\[|\bunroll=1\b", str(jaxpr)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_written_out_or_not(name):
    make = PROGRAMS[name]
    short, long = make(False), make(True)
    assert loops(long) < loops(short), (loops(short), loops(long))
