"""Jitted, default compiler flags, real sizes: where compilers, not formulas, go wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import CG, Diagonal, GaussNewton, Hessian, Implicit, LinearModel, Neumann, Stochastic
from bilevel.ground.traced import contains_primitive
from bilevel.hypergradient import implicit

ROWS, FEATURES, CLASSES = 10_000, 784, 10


def cross_entropy(logits, lam, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))


def penalty(w, lam):
    return 0.5 * jnp.sum(jnp.exp(lam) * w**2)


OPERATOR = GaussNewton(LinearModel(lambda lam, batch: batch[0]), cross_entropy, penalty=penalty)


def validation(w, lam, batch):
    return cross_entropy(batch[0] @ w, lam, batch)


@functools.cache
def logistic():
    """Shaped as flattened 28 x 28 images: columns of all scales, and dead ones at the border."""
    rng = np.random.default_rng(0)
    scale = np.geomspace(1, 0.05, FEATURES) * (rng.random(FEATURES) > 0.1)
    x = (rng.standard_normal((ROWS + 1000, FEATURES)) * scale).astype(np.float32)
    w = (0.05 * rng.standard_normal((FEATURES, CLASSES))).astype(np.float32)
    y = (x @ rng.standard_normal((FEATURES, CLASSES)) + rng.gumbel(size=(len(x), CLASSES))).argmax(
        1
    )
    y = y.astype(np.int32)
    lam = (-6 + rng.standard_normal((FEATURES, CLASSES))).astype(np.float32)
    return w, lam, (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])


@functools.partial(jax.jit, static_argnames="warm")
def solve(response, w, lam, tr, va, warm=False):
    state = None
    if warm:  # zeros made in the same program: the compiler knows them to be zero
        state = bilevel.hypergrad_init(validation, OPERATOR.loss, response, w, lam)
    return bilevel.hypergrad_solve(
        validation, OPERATOR.loss, response, w, lam, inner_batch=tr, outer_batch=va, state=state
    )


@functools.cache
def twin():
    """The same in float64, solved to 1e-10."""
    wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, logistic())
    sol = solve(Implicit(CG(500, rtol=1e-10, preconditioner=Diagonal()), OPERATOR), *wide)
    assert int(sol.result) == bilevel.Status.not_stationary  # the system is solved, see below
    return np.asarray(sol.grads)


CASES = {
    "plain": (CG(500, rtol=1e-6), False),
    "diagonal": (CG(500, rtol=1e-6, preconditioner=Diagonal()), False),
    "diagonal-from-zeros": (CG(500, rtol=1e-6, preconditioner=Diagonal()), True),
}


@functools.cache
def solved(name):
    solver, warm = CASES[name]
    return solve(Implicit(solver, OPERATOR), *logistic(), warm=warm)


# 1e-5 is the promise at tolerance 1e-6. A residual bounds the error only up to the condition
# number, so the promise is one for problems as hard as this one (103 plain steps, 41 with the
# diagonal; errors 2e-6 and 5e-6). A much weaker penalty needs a tighter tolerance.
@pytest.mark.parametrize("name", CASES)
def test_float32_logistic_regression_equals_its_float64_twin(name):
    sol = solved(name)
    assert sol.grads.dtype == jnp.float32
    # Random parameters, so nothing graver than that they are not at a minimum.
    assert int(sol.result) == bilevel.Status.not_stationary, bilevel.Status(int(sol.result))
    exact = twin()
    error = np.linalg.norm(np.asarray(sol.grads, float) - exact) / np.linalg.norm(exact)
    assert error < 1e-5


def test_the_diagonal_halves_the_work():
    plain, diagonal = (int(solved(n).stats["num_matvecs"]) for n in ("plain", "diagonal"))
    assert diagonal <= 0.6 * plain


@pytest.mark.parametrize("solver", [CG(3), Neumann(3, 0.1)], ids=["cg", "neumann"])
def test_zero_start_of_a_hessian_is_no_constant(solver):
    """The fault needs a product with a constant zero in a fused softmax reduction."""
    w, lam, tr, va = logistic()

    @jax.jit
    def both(w, lam, tr, va):
        options = {"inner_batch": tr, "outer_batch": va}
        response = Implicit(solver, Hessian())
        args = (validation, OPERATOR.loss, response, w, lam)
        state = bilevel.hypergrad_init(*args)
        return (
            bilevel.hypergrad_solve(*args, **options, state=state).grads,
            bilevel.hypergrad_solve(*args, **options).grads,
        )

    small = (tr[0][:2000], tr[1][:2000])
    warm, cold = both(w, lam, small, va)
    assert np.isfinite(warm).all() and float(jnp.abs(cold).max()) > 0
    np.testing.assert_allclose(warm, cold, rtol=1e-3, atol=1e-5 * float(jnp.abs(cold).max()))


# -- convolutions ------------------------------------------------------------------------------


def cnn_inner(w, lam, batch):
    x, y = batch
    z = jax.lax.conv_general_dilated(x, w["conv"], (1, 1), "SAME")
    logits = jnp.tanh(z).mean((2, 3)) @ w["head"]
    decay = jnp.exp(lam) * (jnp.sum(w["conv"] ** 2) + jnp.sum(w["head"] ** 2))
    return cross_entropy(logits, lam, (x, y)) + decay


def conv_in_loop(jaxpr, inside=False):
    """Whether a convolution stands in the body of a loop."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name.startswith("conv_general_dilated"):
            return True
        deeper = inside or eqn.primitive.name in ("while", "scan")
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                body = getattr(item, "jaxpr", item)
                if hasattr(body, "eqns") and conv_in_loop(body, deeper):
                    return True
    return False


def cnn_program(response, steps=None):
    rng = np.random.default_rng(0)
    w = {"conv": rng.standard_normal((4, 3, 3, 3)), "head": rng.standard_normal((4, 10))}
    batch = rng.standard_normal((2, 3, 8, 8)), np.zeros(2, np.int32)

    def run(w, lam, batch, key):
        return bilevel.hypergrad_solve(
            cnn_inner, cnn_inner, response, w, lam, inner_batch=batch, outer_batch=batch, key=key
        ).grads

    args = (w, np.float64(-3.0), batch, jax.random.key(0))
    assert contains_primitive(run, *args, prefix="conv_general_dilated")
    return jax.make_jaxpr(run)(*args).jaxpr


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other back ends keep their loops")
@pytest.mark.parametrize(
    "solver",
    [
        Neumann(5),
        CG(5, rtol=1e-3, preconditioner=Diagonal(2)),
        Stochastic(optax.sgd(0.1), 5),
        bilevel.Nystrom(3),
    ],
    ids=lambda s: type(s).__name__,
)
def test_convolutions_never_stand_in_a_loop_on_cpu(solver):
    assert not conv_in_loop(cnn_program(Implicit(solver, Hessian(0.1))))


def test_the_search_for_loops_finds_one():
    assert conv_in_loop(cnn_program(Implicit(Neumann(5, 0.1, unroll=False))))
    assert conv_in_loop(cnn_program(Implicit(CG(5, unroll=False))))


# -- one dropout mask within a solve --------------------------------------------------------------


def test_one_frozen_dropout_mask_converges_and_fresh_ones_diverge():
    rng = np.random.default_rng(0)
    # Fewer examples than weights: masks matter most where networks live.
    x, y = rng.standard_normal((20, 40)), rng.standard_normal(20)
    w, lam = 0.1 * rng.standard_normal(40), np.float64(-4.0)

    def inner(w, lam, batch):
        x, y, key = batch
        mask = jax.random.bernoulli(key, 0.5, x.shape) / 0.5
        return 0.5 * jnp.mean(((x * mask) @ w - y) ** 2) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)

    def outer(w, lam, batch):
        return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)

    key = jax.random.key(3)
    frozen = jax.jit(bilevel.hypergrad_solve, static_argnums=(0, 1))(
        outer, inner, Implicit(CG(200, rtol=1e-8)), w, lam, inner_batch=(x, y, key),
        outer_batch=(x, y),
    )  # fmt: skip
    assert int(frozen.result) == bilevel.Status.not_stationary  # random parameters, no worse
    assert float(frozen.stats["residual_norm"]) <= 1e-7 * float(frozen.stats["rhs_norm"])

    problem = bilevel.Problem(outer, inner)

    def fresh(v):  # another mask in every product, as a loss that draws its own would have it
        bits = jax.lax.bitcast_convert_type(jnp.sum(v), jnp.uint32)
        return problem.hvp(w, lam, (x, y, jax.random.fold_in(key, bits[0])), v)

    g = jax.grad(outer)(w, lam, (x, y))
    got = jax.jit(lambda g: CG(60, rtol=1e-8).solve(fresh, g))(g)
    # The mean over masks is known in closed form: X'X/N, its diagonal doubled, plus the penalty.
    gram = x.T @ x / len(x)
    mean = gram + np.diag(np.diag(gram)) + np.exp(lam) * np.eye(40)
    # Worse than not starting, after more steps than there are weights.
    assert float(np.linalg.norm(mean @ got.value - g)) > 2 * float(np.linalg.norm(g))
    assert int(got.result) != 0  # and it does not claim success


@pytest.mark.parametrize("solver", [CG(5), Neumann(5)], ids=lambda solver: type(solver).__name__)
def test_what_only_regularizes_is_kept_out_of_the_solve(solver, monkeypatch):
    """A strength for each weight: their exponentials are not in memory while products are made."""
    sizes, w = (300, 200, 10), []
    for m, n in zip(sizes[:-1], sizes[1:], strict=True):
        w.append(jnp.full((m, n), 0.1, jnp.float32))
    x, y = jnp.ones((16, sizes[0]), jnp.float32), jnp.zeros(16, jnp.int32)

    def outer(w, lam, batch):
        return cross_entropy(jnp.tanh(batch[0] @ w[0]) @ w[1], lam, batch)

    def inner(w, lam, batch):
        return outer(w, lam, batch) + sum(map(penalty, w, lam))

    def solve(w, lam, batch):
        return bilevel.hypergrad_solve(
            outer, inner, Implicit(solver), w, lam, inner_batch=batch, outer_batch=batch
        )

    def temporary():
        compiled = jax.jit(lambda *args: solve(*args)).lower(w, w, (x, y)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    used = temporary()
    monkeypatch.setattr(implicit, "costly_to_redo", lambda *args: True)
    assert used <= temporary() - 0.9 * sum(leaf.nbytes for leaf in w)
