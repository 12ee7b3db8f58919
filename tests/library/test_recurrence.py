"""The LSTM: every derivative equals the plain loop's, and the kernel waits for its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from bilevel.inner.recurrence import lstm

T, B, N = 5, 3, 2


def _plain(carry, projected, kernel):
    def step(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x + h @ kernel, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return jax.lax.scan(step, carry, projected)


def _arguments(dtype=jnp.float64):
    shapes = [(B, N), (B, N), (T, B, 4 * N), (N, 4 * N)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    c, h, *rest = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    return (c, h), *rest


def _loss(recurrence):
    def loss(*args):
        (c, _), outputs = recurrence(*args)
        return jnp.sum(outputs**2) + jnp.sum(jnp.sin(c))

    return loss


ALL = (0, 1, 2)


@pytest.mark.parametrize("argnums", [ALL, (0,), (1,), (2,)], ids=str)
def test_derivatives_are_those_of_the_plain_loop(argnums):
    args = _arguments()
    chosen = tuple(args[i] for i in argnums)
    direction = jax.tree.map(jnp.cos, chosen)

    def derivatives(recurrence):
        def of(*chosen):
            full = list(args)
            for i, value in zip(argnums, chosen, strict=True):
                full[i] = value
            return _loss(recurrence)(*full)

        where = tuple(range(len(chosen)))
        gradient = jax.grad(of, where)
        forward = jax.jvp(of, chosen, direction)
        over = jax.jvp(gradient, chosen, direction)[1]
        back = jax.grad(
            lambda *c: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(*c))), where
        )(*chosen)
        return forward, gradient(*chosen), over, back

    ours, plain = (jax.jit(lambda r=r: derivatives(r))() for r in (lstm, _plain))
    # Float64 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), ours, plain)


def test_many_batches_at_once():
    carry, projected, kernel = _arguments()
    stacked = jnp.stack([projected, 2 * projected])

    def of(recurrence, x):
        return jax.grad(_loss(recurrence), 2)(carry, x, kernel)

    one = jax.jit(lambda x: of(_plain, x))
    plain = [one(x) for x in stacked]
    mapped = jax.jit(jax.vmap(lambda x: of(lstm, x)))(stacked)
    np.testing.assert_allclose(mapped, jnp.stack(plain), rtol=1e-11)


def test_no_loop_carries_the_gradient_of_the_kernel():
    args = _arguments(jnp.bfloat16)

    def carried(recurrence):
        """Shapes of what the loops of a gradient carry from step to step."""
        jaxpr = jax.make_jaxpr(jax.grad(_loss(recurrence), 2))(*args)
        shapes = set()
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                (body,) = core.jaxprs_in_params(equation.params)
                # What is carried leaves the loop as it leaves its body; what is stacked gets an
                # axis more. The names of a scan's parameters are JAX's own and change.
                for inside, outside in zip(body.outvars, equation.outvars, strict=True):
                    if inside.aval.shape == outside.aval.shape:
                        shapes.add(inside.aval.shape)
        return shapes

    assert (N, 4 * N) in carried(_plain)
    assert carried(lstm) == {(B, N)}


def test_dtypes_are_kept():
    args = _arguments(jnp.bfloat16)
    (c, h), outputs = lstm(*args)
    gradients = jax.grad(_loss(lstm), ALL)(*args)
    assert {x.dtype for x in (c, h, outputs, *jax.tree.leaves(gradients))} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("wrong", range(3))
def test_shapes_that_do_not_fit_are_named(wrong):
    (c, h), projected, kernel = _arguments()
    broken = [((c, h[:2]), projected, kernel), ((c, h), projected[0], kernel)]
    broken.append(((c, h), projected, kernel.T))
    with pytest.raises(ValueError, match=r"`kernel` \(n, 4n\)"):
        lstm(*broken[wrong])
