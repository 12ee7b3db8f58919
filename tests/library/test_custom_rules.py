"""Inner losses that contain functions with a backward rule of their own (`jax.custom_vjp`)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Dense, GaussNewton, Implicit, Neumann, Stochastic, Unroll

K = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(K[0], (20, 4))
SIGN = jnp.sign(jax.random.normal(K[1], (20,)))


@jax.custom_vjp
def fused(z):
    """Mean softplus, as a fused loss would compute it: forward and backward by hand."""
    return jnp.mean(jnp.logaddexp(0, z))


fused.defvjp(lambda z: (fused(z), z), lambda z, g: (g * jax.nn.sigmoid(z) / z.size,))


def plain(z):
    return jnp.mean(jnp.logaddexp(0, z))


def logits(w, lam, x):
    return -SIGN * (x @ w)


def make(loss):
    """Strengths of a penalty, and one hyperparameter inside the fused function."""

    def inner(w, lam, x):
        z = logits(w, lam, x) * jnp.exp(lam["scale"])
        return loss(z) + 0.05 * jnp.sum(jnp.exp(lam["decay"]) * w**2)

    return inner


def outer(w, lam, x):
    return jnp.sum((w - 1) ** 2) + 0.1 * lam["scale"] ** 2


LAM = {"decay": jnp.linspace(-0.5, 0.5, 4), "scale": jnp.float64(0.2)}


def minimum():
    w = jnp.zeros(4)
    for _ in range(20):
        gradient = jax.grad(make(plain))(w, LAM, X)
        w = w - jnp.linalg.solve(jax.hessian(make(plain))(w, LAM, X), gradient)
    return w


W = minimum()
SPLITS = {
    loss: GaussNewton(
        lambda w, lam, x: logits(w, lam, x) * jnp.exp(lam["scale"]),
        lambda z, lam, x, loss=loss: loss(z),
        penalty=lambda w, lam: 0.05 * jnp.sum(jnp.exp(lam["decay"]) * w**2),
    )
    for loss in (fused, plain)
}
RESPONSES = {
    "cg": lambda loss: Implicit(CG(rtol=1e-10)),
    "cg_on_gauss_newton": lambda loss: Implicit(CG(rtol=1e-10), SPLITS[loss]),
    "dense": lambda loss: Implicit(Dense()),
    "neumann": lambda loss: Implicit(Neumann(30)),
    "fresh": lambda loss: Implicit(Stochastic(optax.sgd(0.5), 3), fresh_batches=True),
    "mixed": lambda loss: Unroll(optax.adam(0.1), 3),
    "sqrt": lambda loss: Unroll(optax.adam(0.1), 4, mode="reverse", remat="sqrt"),
    "difference": lambda loss: bilevel.FiniteDifference(optax.sgd(0.1)),
}


@pytest.mark.parametrize(
    ("name", "under_jit"), [*((name, True) for name in RESPONSES), ("cg", False), ("mixed", False)]
)
def test_a_backward_rule_changes_nothing(name, under_jit):
    def solved(loss):
        response = RESPONSES[name](loss)
        count = getattr(response, "num_inner_batches", lambda: None)()
        batch = X if count is None else jnp.broadcast_to(X, (count, *X.shape))

        def call(w):
            return bilevel.hypergrad(outer, make(loss), response)(
                w, LAM, inner_batch=batch, outer_batch=X
            )

        # Adam at the minimum would divide rounding by rounding.
        return (jax.jit(call) if under_jit else call)(W + 0.3 * (count is not None))

    # The same derivatives by another order of operations: rounding of float64.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        solved(fused), jax.jit(lambda: solved(plain))(),
    )  # fmt: skip


def test_solutions_have_their_first_derivative():
    def value(lam, loss):
        solve = bilevel.with_response(lambda w, lam, x: W, make(loss), Implicit(Dense()))
        return outer(solve(jnp.zeros(4), lam, X), lam, X)

    gradient = jax.jit(jax.grad(value), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
        gradient(LAM, fused), gradient(LAM, plain),
    )  # fmt: skip
    with pytest.raises(TypeError, match="gives the first derivative only"):
        jax.hessian(value)(LAM, fused)


def test_forward_mode_says_what_it_cannot():
    with pytest.raises(TypeError, match=r"`mode='forward'` pushes tangents .*`mode='mixed'`"):
        bilevel.hypergrad(outer, make(fused), Unroll(optax.sgd(0.1), 2, mode="forward"))(
            W, LAM, inner_batch=jnp.broadcast_to(X, (2, *X.shape)), outer_batch=X
        )
