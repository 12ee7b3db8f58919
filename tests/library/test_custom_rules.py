"""Inner losses that contain functions with a backward rule of their own (`jax.custom_vjp`)."""

import functools

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


@jax.custom_jvp
def with_tangent(z):
    return jnp.mean(jnp.logaddexp(0, z))


with_tangent.defjvp(
    lambda primals, tangents: (
        with_tangent(*primals),
        jnp.mean(jax.nn.sigmoid(primals[0]) * tangents[0]),
    )
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mean_of(function, z):
    return jnp.mean(function(z))


mean_of.defvjp(
    lambda function, z: (mean_of(function, z), z),
    lambda function, z, g: (g * jax.vmap(jax.grad(function))(z) / z.size,),
)


SIBLINGS = {
    "custom_jvp": with_tangent,
    "nondiff_argnums": lambda z: mean_of(functools.partial(jnp.logaddexp, 0.0), z),
    "in scan": lambda z: jax.lax.scan(
        lambda total, rows: (total + fused(rows) / 4, None), 0.0, z.reshape(4, -1)
    )[0],
    "in remat": jax.checkpoint(fused),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_siblings_change_nothing_either(name):
    """In a solve, in an unrolled run, and through a solution; or the remedy is named."""
    sibling = SIBLINGS[name]

    def all_of(loss):
        def solved(response, count=None):
            batch = X if count is None else jnp.broadcast_to(X, (count, *X.shape))
            return bilevel.hypergrad(outer, make(loss), response)(
                W + 0.3 * (count is not None), LAM, inner_batch=batch, outer_batch=X
            )

        out = [
            solved(Implicit(CG(rtol=1e-10))),
            solved(Unroll(optax.adam(0.1), 2), 2),
            jax.grad(value)(LAM, loss),
        ]
        if name == "custom_jvp":
            out.append(solved(Unroll(optax.adam(0.1), 2, mode="forward"), 2))
            out.append(jax.hessian(value)(LAM, loss))
        return out

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
        jax.jit(lambda: all_of(sibling))(), jax.jit(lambda: all_of(plain))(),
    )  # fmt: skip
    if name != "custom_jvp":
        with pytest.raises(TypeError, match="first derivative only.*without `jax.custom_vjp`"):
            jax.eval_shape(jax.hessian(lambda lam: value(lam, sibling)), LAM)
        with pytest.raises(TypeError, match=r"`mode='forward'` pushes .*`mode='mixed'`"):
            bilevel.hypergrad(outer, make(sibling), Unroll(optax.sgd(0.1), 2, mode="forward"))(
                W, LAM, inner_batch=jnp.broadcast_to(X, (2, *X.shape)), outer_batch=X
            )


@jax.custom_vjp
def bounded(z):
    return jnp.tanh(z)


bounded.defvjp(lambda z: (bounded(z), jnp.tanh(z)), lambda t, g: (g * (1 - t**2),))


def in_model(activation):
    """A network whose activation has a backward rule of its own: its value is used, too."""
    return GaussNewton(
        lambda w, lam, x: activation(logits(w, lam, x)) * jnp.exp(lam["scale"]),
        lambda z, lam, x: plain(z),
        penalty=lambda w, lam: 0.05 * jnp.sum(jnp.exp(lam["decay"]) * w**2),
    )


@pytest.mark.parametrize("name", ["gauss-newton", "hessian", "unrolled", "solution"])
def test_a_backward_rule_inside_the_model(name):
    """No tangent passes: products are pulled back twice, and the tangent map is transposed."""

    def all_of(activation):
        operator = in_model(activation)

        def solved(response, w=W, count=None):
            batch = X if count is None else jnp.broadcast_to(X, (count, *X.shape))
            return bilevel.hypergrad(outer, operator.loss, response)(
                w, LAM, inner_batch=batch, outer_batch=X
            )

        if name == "gauss-newton":
            return [solved(Implicit(s, operator)) for s in (CG(8), Dense(), bilevel.Woodbury())]
        if name == "hessian":
            return [solved(Implicit(s)) for s in (CG(8), Dense(), Neumann(3))]
        if name == "unrolled":
            plateau = optax.chain(optax.polyak_sgd(1e3), optax.scale(0.1))  # reads the loss
            return [solved(Unroll(tx, 2), W + 0.3, 2) for tx in (optax.adam(0.1), plateau)]
        solve = bilevel.with_response(lambda w, lam, x: W, operator.loss, Implicit(Dense()))
        return jax.grad(lambda lam, x: outer(solve(jnp.zeros(4), lam, x), lam, x), (0, 1))(LAM, X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12),
        jax.jit(lambda: all_of(bounded))(), jax.jit(lambda: all_of(jnp.tanh))(),
    )  # fmt: skip


def test_a_fused_loss_at_the_end_is_no_obstacle(monkeypatch):
    """Forward-over-reverse, the cheaper order, wherever it is possible."""
    pulled = []
    vjp = jax.vjp
    monkeypatch.setattr(
        jax, "vjp", lambda *args, **kwargs: pulled.append(1) or vjp(*args, **kwargs)
    )
    problem = bilevel.problem.two_losses.Problem(outer, make(fused))
    jax.eval_shape(lambda w: problem.products(w, LAM, X, w), W)
    assert not pulled
    problem = bilevel.problem.two_losses.Problem(outer, in_model(bounded).loss)
    jax.eval_shape(lambda w: problem.products(w, LAM, X, w), W)
    assert pulled


def value(lam, loss):
    solve = bilevel.with_response(lambda w, lam, x: W, make(loss), Implicit(Dense()))
    return outer(solve(jnp.zeros(4), lam, X), lam, X)


def test_solutions_have_their_first_derivative():
    want = jax.jit(lambda: jax.grad(value)(LAM, plain))()
    # Not compiled too: there JAX runs what a compiler would leave out.
    for gradient in (jax.grad(value), jax.jit(jax.grad(value), static_argnums=1)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient(LAM, fused), want
        )
    with pytest.raises(TypeError, match="gives the first derivative only"):
        jax.hessian(value)(LAM, fused)


def test_forward_mode_says_what_it_cannot():
    with pytest.raises(TypeError, match=r"`mode='forward'` pushes tangents .*`mode='mixed'`"):
        bilevel.hypergrad(outer, make(fused), Unroll(optax.sgd(0.1), 2, mode="forward"))(
            W, LAM, inner_batch=jnp.broadcast_to(X, (2, *X.shape)), outer_batch=X
        )
