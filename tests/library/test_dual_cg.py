"""Conjugate gradients among the outputs: the same iterates as among the parameters, for less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from test_curvature_layers import (
    KEYS,
    NETWORKS,
    UNITS,
    bound,
    jacobian,
    like,
    mlp,
    penalty,
    relative,
    wavy,
)

import bilevel
from bilevel import CG, DualCG, Hessian, Status, Woodbury
from bilevel.linear.precondition import Prepared
from bilevel.problem.two_losses import Problem


def per_leaf(w, hparams):
    """One strength for each leaf, as the recipe for networks has them."""
    leaves = jax.tree.leaves(w)
    return 0.5 * sum((i + 1) * jnp.sum(x**2) for i, x in enumerate(leaves))


def per_unit(w, hparams):
    """One strength for each entry of the last axis."""
    leaves = jax.tree.leaves(w)
    units = [1 + jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape) for x in leaves]
    return 0.5 * sum(jnp.sum(s * x**2) for s, x in zip(units, leaves, strict=True))


class ByD:
    """D as a preconditioner of CG."""

    def prepare(self, mv, rhs, key):
        inverse = jax.tree.map(lambda d: 1 / d, mv.sampled.known())
        return Prepared(lambda r: jax.tree.map(jnp.multiply, inverse, r), 0, {})


def solved(solver, amap, g, x0=None):
    return jax.jit(lambda g, x0: solver.solve(amap, g, x0))(g, x0)


# ---- The dual product ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pen"),
    [("mlp", None), ("mlp", per_leaf), ("mlp", per_unit), ("mlp", penalty), ("positions", penalty)]
    + [pytest.param("cnn", p, marks=pytest.mark.slow) for p in (None, penalty)],
)
def test_kernel_is_the_jacobian_times_its_transpose(name, pen):
    model, params = NETWORKS[name]()
    parts = bound(model, params, pen=pen, independent=False).parts()
    j, _ = jacobian(model, params)
    d = jax.tree.map(lambda x: 1 / x, parts.diagonal)
    u = jax.random.normal(KEYS[9], (j.shape[0] // UNITS, UNITS))
    got = jax.jit(lambda d, u: parts.kernel(d)(u))(d, u)
    want = (j * ravel_pytree(d)[0][None]) @ (j.T @ u.reshape(-1))
    np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-10, atol=1e-12)


def shapes_within(jaxpr, found):
    for eqn in jaxpr.eqns:
        found.update(v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    shapes_within(part, found)
    return found


def test_no_step_makes_what_is_as_large_as_a_kernel():
    model, params = mlp()
    amap, g = bound(model, params), like(params)

    def made(solver):
        program = jax.make_jaxpr(lambda g: solver.solve(amap, g).value)(g).jaxpr
        loops = [e for e in program.eqns if e.primitive.name == "while"]
        return shapes_within(loops[0].params["body_jaxpr"].jaxpr, set())

    assert (72, 5) in made(CG(3)) and (72, 5) not in made(DualCG(3))


# ---- The iterates ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_iterates_are_those_of_cg(steps):
    model, params = mlp()
    amap, g, x0 = bound(model, params, damping=0.3), like(params), like(params, 7)
    x0 = jax.tree.map(lambda x: 0.1 * x, x0)
    for start in (None, x0):
        want, got = (solved(solver(steps), amap, g, start) for solver in (CG, DualCG))
        assert relative(got.value, want.value) < 1e-12
        left = relative(amap(got.value), g) * float(got.stats["rhs_norm"])
        np.testing.assert_allclose(got.stats["residual_norm"], left, rtol=1e-10)
        assert int(got.result) == int(want.result)
        assert int(got.stats["num_matvecs"]) == steps + 1 + (start is not None and steps == 1)
        assert ("warm_start_used" in got.stats) == (start is not None)
    assert bool(got.stats["warm_start_used"])
    assert float(got.stats["covered"]) == 1.0


@pytest.mark.parametrize("pen", [per_leaf, per_unit, penalty])
def test_iterates_with_a_penalty_are_those_of_cg_preconditioned_by_it(pen):
    model, params = mlp()
    amap, g = bound(model, params, pen=pen, damping=0.01, independent=False), like(params)
    want = solved(CG(3, preconditioner=ByD()), amap, g)
    assert relative(solved(DualCG(3), amap, g).value, want.value) < 1e-12


@pytest.mark.parametrize(
    ("name", "pen"),
    [("mlp", penalty), ("positions", None)]
    + [pytest.param("cnn", p, marks=pytest.mark.slow) for p in (None, penalty)],
)
def test_to_a_tolerance_it_is_the_exact_inverse(name, pen):
    model, params = NETWORKS[name]()
    amap, g = bound(model, params, pen=pen, damping=0.1), like(params)
    got, want = solved(DualCG(100, rtol=1e-6), amap, g), solved(Woodbury(), amap, g)
    assert relative(got.value, want.value) < 1e-5 and int(got.result) == 0
    assert float(got.stats["residual_norm"]) <= 1e-6 * float(got.stats["rhs_norm"])
    early = solved(DualCG(2, rtol=1e-6), amap, g)
    assert int(early.result) in (Status.max_steps, Status.worse_than_zero)


def test_it_may_be_mapped():
    model, params = mlp()
    many = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params)

    def solve(p):
        return DualCG(4).solve(bound(model, p, pen=per_leaf), p).value

    got = jax.jit(jax.vmap(solve))(many)
    want = jax.jit(solve)(jax.tree.map(lambda x: x[1], many))
    assert relative(jax.tree.map(lambda x: x[1], got), want) < 1e-12


# ---- What it cannot do -----------------------------------------------------------------------


def test_negative_curvature_is_said():
    model, params = mlp()
    g = like(params)
    concave = bound(model, params, pen=lambda w, h: -penalty(w, h))
    assert int(solved(DualCG(3), concave, g).result) == Status.negative_curvature
    got = solved(DualCG(30), bound(model, params, loss=wavy, damping=1e-6), g)
    assert int(got.result) == Status.negative_curvature
    assert np.isfinite(ravel_pytree(got.value)[0]).all()


def test_what_rounding_hides_is_said():
    model, params = mlp()

    def loss(z, hparams, batch):
        return 1e3 * jnp.mean(z**2)

    def narrow(t):
        return jax.tree.map(lambda x: x.astype(jnp.float32), t)

    amap = bound(lambda p, h, b: model(p, h, narrow(b)), narrow(params), loss=loss, damping=1e-3)
    inside = narrow(amap.undamped(narrow(like(params))))  # a right side in the range of J'
    got = solved(DualCG(100, rtol=1e-6), amap, inside)
    assert int(got.result) in (Status.stagnated, Status.truncated, Status.worse_than_zero)
    left = relative(amap(got.value), inside)
    np.testing.assert_allclose(
        got.stats["residual_norm"] / got.stats["rhs_norm"], left, rtol=0.1, atol=1e-5
    )


def test_errors():
    model, params = mlp()
    g = like(params)
    loss = bilevel.GaussNewton(model, wavy).loss
    batch = (jnp.ones((4, 72)),)
    hessian = Hessian(0.1).bind(Problem(loss, loss), params, None, batch, fresh=False)
    with pytest.raises(ValueError, match="DualCG iterates among the outputs"):
        DualCG().solve(hessian.mv, g)
    with pytest.raises(ValueError, match="DualCG divides by D"):
        DualCG().solve(bound(model, params, damping=0.0), g)
