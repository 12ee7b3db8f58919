"""Designs of `jax.experimental.sparse` as leaves of a batch: right, and never made dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import bilevel
from bilevel import CG, Composite, FixedPoint, Implicit, Neumann, prox

ROWS, COLUMNS = 61, 307
RNG = np.random.default_rng(0)
DENSE = RNG.standard_normal((ROWS, COLUMNS)) * (RNG.uniform(size=(ROWS, COLUMNS)) < 0.05)
Y = jnp.asarray(DENSE[:, :20].sum(1) + 0.1 * RNG.standard_normal(ROWS))
DESIGNS = {"dense": jnp.asarray(DENSE), "sparse": sparse.BCOO.fromdense(DENSE)}
START, LAM = jnp.zeros(COLUMNS), jnp.float64(-4.0)


def error(w, lam, batch):
    return 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)


def ridge(w, lam, batch):
    return error(w, lam, batch) + 0.5 * jnp.exp(lam) * jnp.sum(w**2)


def soft(w, lam, s):
    return prox.l1(w, jnp.exp(lam), s)


LASSO = Composite(error, soft)
SPLIT = bilevel.GaussNewton(
    lambda w, lam, b: b[0] @ w,
    lambda z, lam, b: 0.5 * jnp.mean((z - b[1]) ** 2),
    penalty=lambda w, lam: 0.5 * jnp.exp(lam) * jnp.sum(w**2),
)


def gradient(inner, response):
    def call(x, y, w):
        return bilevel.hypergrad(error, inner, response)(
            w, LAM, inner_batch=(x, y), outer_batch=(x, y)
        )

    return call


def through_solver(inner):
    fit = bilevel.with_response(
        lambda w, lam, b: bilevel.minimize(inner, w, lam, b, tol=1e-9, max_steps=3000).params,
        inner, Implicit(CG(max_steps=300, rtol=1e-10)),
    )  # fmt: skip
    return lambda x, y, w: jax.grad(lambda lam: error(fit(w, lam, (x, y)), lam, (x, y)))(LAM)


def solution(inner):
    def call(x, y, w):
        return bilevel.minimize(inner, w, LAM, (x, y), tol=1e-9, max_steps=3000).params

    return call


CALLS = {
    "minimize": solution(ridge),
    "minimize, composite": solution(LASSO),
    "hypergrad": gradient(ridge, Implicit(CG(max_steps=300, rtol=1e-10))),
    "hypergrad, composite": gradient(LASSO, Implicit(CG(max_steps=300, rtol=1e-10))),
    "hypergrad, fixed point": gradient(
        FixedPoint(bilevel.proximal_step(error, soft, 1.0)), Implicit(Neumann(50))
    ),
    "gauss-newton": gradient(ridge, Implicit(CG(max_steps=300, rtol=1e-10), SPLIT)),
    "with_response": through_solver(ridge),
    "with_response, composite": through_solver(LASSO),
}


def dense_buffer(text):
    return any(f"[{a},{b}]" in text for a, b in ((ROWS, COLUMNS), (COLUMNS, ROWS)))


@pytest.mark.parametrize("name", CALLS)
def test_a_sparse_design_gives_the_same_and_is_never_made_dense(name):
    w = jnp.asarray(np.linspace(-0.1, 0.1, COLUMNS))
    w = w if name.startswith(("hyper", "gauss")) else START
    got = {}
    for kind, x in DESIGNS.items():
        compiled = jax.jit(CALLS[name]).lower(x, Y, w).compile()
        got[kind] = compiled(x, Y, w)
        assert dense_buffer(compiled.as_text()) == (kind == "dense")
    np.testing.assert_allclose(got["sparse"], got["dense"], rtol=1e-5, atol=1e-8)


def test_tools_read_sparse_designs():
    batch = (DESIGNS["sparse"], Y)
    w = solution(ridge)(*batch, START)
    found = bilevel.diagnose(ridge, w, LAM, inner_batch=batch, print=False)
    assert found.stationary
    check = bilevel.check_hypergrad(
        error, ridge, Implicit(CG(max_steps=300, rtol=1e-10)), w, LAM,
        inner_batch=batch, outer_batch=batch,
    )  # fmt: skip
    assert check.passed, check.message
