"""Factorizations under `vmap`: right, differentiable, and never a batch of matrices at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.ground.factor import cholesky, solve
from bilevel.objectives import LaplaceEvidence

RNG = np.random.default_rng(3)
HALF = RNG.normal(size=(3, 4, 4))
MATRICES = HALF @ HALF.transpose(0, 2, 1) + np.eye(4)
RIGHT = RNG.normal(size=(3, 4))


def factorizations(jaxpr):
    """How many axes each matrix has that is factorized, loops and calls included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("cholesky", "lu"):
            found.append(eqn.invars[0].aval.ndim)
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inside = getattr(sub, "jaxpr", sub)
            found += factorizations(inside) if hasattr(inside, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda m, b: jnp.sum(jnp.sin(cholesky(m)) * b[:, None]),
            lambda m, b: jnp.sum(jnp.sin(jnp.linalg.cholesky((m + m.T) / 2)) * b[:, None]),
        ),
        (
            lambda m, b: jnp.sum(jnp.sin(solve(m, b))),
            lambda m, b: jnp.sum(jnp.sin(jnp.linalg.solve(m, b))),
        ),
    ],
)
def test_values_and_two_derivatives_are_those_of_jax(ours, theirs):
    def both(function):
        symmetric = lambda m, b: function((m + m.T) / 2, b)  # noqa: E731
        slope = jax.grad(symmetric, argnums=(0, 1))
        bend = lambda m, b: jax.grad(lambda m, b: jnp.sum(jnp.sin(slope(m, b)[0])))(m, b)  # noqa: E731
        several = lambda m, b: (symmetric(m, b), slope(m, b), bend(m, b))  # noqa: E731
        return jax.jit(jax.vmap(several))(MATRICES, RIGHT)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
        both(ours), both(theirs),
    )  # fmt: skip


def test_a_vmap_factorizes_one_matrix_at_a_time():
    """Batches of them on two threads wait for each other forever (jaxlib 0.10.2)."""
    x, y = RNG.normal(size=(3, 5, 2)), RNG.normal(size=(3, 5))
    w = RNG.normal(size=(3, 2))

    def model(w, lam, batch):
        return batch[0] @ w

    def error(f, lam, batch):
        return 0.5 * jnp.mean((f - batch[1]) ** 2)

    rows, layers = (
        bilevel.Implicit(
            bilevel.Woodbury(structured=structured),
            bilevel.GaussNewton(model, error, damping=0.1, independent_examples=True),
        )
        for structured in (False, True)
    )
    evidence = LaplaceEvidence(
        model, lambda f, lam, batch: 0.5 * (f - batch[1]) ** 2, 5,
        log_precision=lambda lam: lam, block=1,
    )  # fmt: skip
    outer = lambda w, lam, batch: error(model(w, lam, batch), lam, batch)  # noqa: E731
    inner = lambda w, lam, b: outer(w, lam, b) + 0.05 * jnp.exp(lam) * jnp.sum(w**2)  # noqa: E731

    def hypergradients(w, x, y):
        batch = (x, y)
        grads = [
            bilevel.hypergrad_solve(
                outer, inner, response, w, jnp.zeros(()), inner_batch=batch, outer_batch=batch
            ).grads
            for response in (rows, layers)
        ]
        return *grads, jax.grad(evidence.outer)(w, jnp.zeros(()), batch)

    found = factorizations(jax.make_jaxpr(jax.vmap(hypergradients))(w, x, y).jaxpr)
    assert len(found) >= 4
    assert set(found) == {2}
    batched = factorizations(jax.make_jaxpr(jax.vmap(jnp.linalg.cholesky))(MATRICES).jaxpr)
    assert batched == [3]  # what would be found
