"""What holds for every problem: any tree, dtype, order of leaves, change of variables."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import (
    CG,
    Dense,
    Hessian,
    Implicit,
    Neumann,
    Nystrom,
    Status,
    Stochastic,
    hypergrad,
    hypergrad_solve,
)
from bilevel.testing import cases, flatten, relative_error

ALL = {case.name: case for case in cases()}
KEY = jax.random.key(11)
# Each example compiles: few of them, without a deadline, the same ones in every run.
FEW = settings(max_examples=5, deadline=None, derandomize=True, database=None)

shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
trees = st.recursive(
    shapes,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3).map(
            lambda d: {**d, "none": None}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda x: ("tuple", *x)),
    ),
    max_leaves=4,
)


def build(tree: Any, rng: np.random.Generator, dtype: Any) -> Any:
    """Arrays in the place of shapes; a tuple is a container only if it says so."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: build(v, rng, dtype) for k, v in tree.items()}
    if tree and tree[0] == "tuple":
        return tuple(build(v, rng, dtype) for v in tree[1:])
    return jnp.asarray(0.5 * rng.standard_normal(tree), dtype)


def tree_size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def total(tree: Any, fn: Any) -> jax.Array:
    return sum(jnp.sum(fn(x)) for x in jax.tree.leaves(tree))


def inner(params: Any, hparams: Any, batch: jax.Array) -> jax.Array:
    """Strongly convex, condition below 5, every leaf coupled to every other through the sum."""
    mean = total(params, lambda x: x) / np.sqrt(tree_size(params))
    bend = total(params, lambda x: x**2 / 2 + x**4 / 20)
    return jnp.mean(jnp.log(jnp.cosh(batch * mean))) + (1 + total(hparams, jnp.exp)) * bend


def outer(params: Any, hparams: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.cos(batch * total(params, jnp.tanh))) + total(hparams, jnp.sin) * total(
        params, lambda x: x
    )


def exact(params: Any, hparams: Any, inner_batch: Any, outer_batch: Any) -> np.ndarray:
    """The formula at the same (rounded) point, in NumPy: it holds wherever H is definite."""
    w, lam, b, bv = map(flatten, (params, hparams, inner_batch, outer_batch))
    n = len(w)
    coupling = np.mean(b**2 / np.cosh(b * w.sum() / np.sqrt(n)) ** 2) / n
    strength = 1 + np.exp(lam).sum()
    hessian = coupling * np.ones((n, n)) + strength * np.diag(1 + 0.6 * w**2)
    cross = np.outer(w + w**3 / 5, np.exp(lam))
    g = -np.mean(bv * np.sin(bv * np.tanh(w).sum())) / np.cosh(w) ** 2 + np.sin(lam).sum()
    return np.cos(lam) * w.sum() - cross.T @ np.linalg.solve(hessian, g)


# Relative error of one product in the dtype, times the few products of a solve of condition < 5.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}


@FEW
@given(tree=trees, htree=shapes, seed=st.integers(0, 100))
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_any_tree_any_dtype_and_a_batch_of_one(dtype, tree, htree, seed):
    rng = np.random.default_rng(seed)
    params = {"first": jnp.asarray(0.3, dtype), "rest": build(tree, rng, dtype)}
    hparams = {"x": build(htree, rng, dtype), "none": None}
    batches = [jnp.asarray(rng.uniform(0.5, 1.5, 1), dtype) for _ in range(2)]

    @jax.jit
    def solve(params, hparams, inner_batch, outer_batch):
        return hypergrad_solve(
            outer,
            inner,
            Implicit(CG(max_steps=12)),
            params,
            hparams,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
        )

    solution = solve(params, hparams, *batches)
    assert jax.tree.structure(solution.grads) == jax.tree.structure(hparams)
    for got, like in zip(jax.tree.leaves(solution.grads), jax.tree.leaves(hparams), strict=True):
        assert got.dtype == like.dtype and got.shape == like.shape
    wide = jnp.promote_types(dtype, jnp.float32)
    assert all(x.dtype == wide for x in jax.tree.leaves(solution.state))
    truth = exact(params, hparams, *batches)
    scale = np.linalg.norm(flatten(solution.direct)) + np.linalg.norm(flatten(solution.indirect))
    assert np.linalg.norm(flatten(solution.grads) - truth) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["ridge_per_feature", "softmax_per_weight"])
def test_cases_in_narrow_dtypes(dtype, name):
    """Healthy problems, so the status must not cry wolf: Neumann and CG by budget are ok."""
    case = ALL[name].astype(dtype)
    step = float(1 / np.linalg.eigvalsh(case.truth().hessian)[-1])

    @jax.jit
    def both():
        return [case.solve(Implicit(s)) for s in (CG(max_steps=8), Neumann(60, step))]

    for solution in both():
        error = relative_error(solution.grads, case.truth().hypergrad())
        assert error <= {"float32": 1e-3, "bfloat16": 0.1}[dtype]
        assert int(solution.result) == Status.ok
        assert all(x.dtype == dtype for x in jax.tree.leaves(solution.grads))


LINEAR = {  # truncated CG is left out: it is only homogeneous in g
    "dense": Dense(),
    "neumann": Neumann(5, 0.1),
    "stochastic": Stochastic(optax.sgd(0.1), 5),
    "nystrom": Nystrom(3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_in_the_outer_loss(name):
    """One compiled program, in which the weights of two outer losses are arguments."""
    case = ALL["logistic_per_feature"]
    response = Implicit(LINEAR[name], Hessian(0.2))

    def mixed(params, hparams, batch):
        (a, b), data = batch
        return a * case.outer(params, hparams, data) + b * total(params, jnp.cos)

    @jax.jit
    def grads(a, b):
        return hypergrad(mixed, case.inner, response)(
            case.params,
            case.hparams,
            inner_batch=case.inner_batch,
            outer_batch=((a, b), case.outer_batch),
            key=KEY,
        )

    first, second = flatten(grads(1.0, 0.0)), flatten(grads(0.0, 1.0))
    assert relative_error(grads(2.0, -3.0), 2 * first - 3 * second) < 1e-11
    assert np.linalg.norm(first - second) > 1e-3


def test_invariant_to_the_order_of_leaves():
    case = ALL["ridge_per_feature"]

    def renamed(tree):  # dictionaries flatten by key: the order of the two leaves turns round
        return {"z": tree["bias"], "a": tree["kernel"]}

    def back(loss):
        def call(params, hparams, batch):
            undo = [{"bias": t["z"], "kernel": t["a"]} for t in (params, hparams)]
            return loss(*undo, batch)

        return call

    solvers = (Dense(), CG(rtol=1e-13), Neumann(5, 0.1))

    @jax.jit
    def both():
        straight = [case.solve(Implicit(s)).grads for s in solvers]
        turned = [
            hypergrad(back(case.outer), back(case.inner), Implicit(s))(
                renamed(case.params),
                renamed(case.hparams),
                inner_batch=case.inner_batch,
                outer_batch=case.outer_batch,
            )
            for s in solvers
        ]
        return straight, turned

    for straight, turned in zip(*both(), strict=True):
        assert relative_error(turned, renamed(straight)) < 1e-11


@FEW
@given(seed=st.integers(0, 1000))
def test_linear_reparametrisation_of_hyperparameters(seed):
    """lam = M u: the hypergradient in u is M' times that in lam."""
    mix = np.random.default_rng(seed).standard_normal((4, 3))
    got, lam_grads = _reparametrised(jnp.asarray(mix))
    assert relative_error(got, mix.T @ flatten(lam_grads)) < 1e-10


@functools.partial(jax.jit)
def _reparametrised(mix):
    case = ALL["quadratic"]
    leaves, treedef = jax.tree.flatten(case.hparams)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    lam = jnp.concatenate([x.reshape(-1) for x in leaves])
    offset = lam - mix @ jnp.ones(3)  # so that u = (1, 1, 1) is the case's own point

    def hparams(u):
        parts = jnp.split(mix @ u + offset, ends)
        return treedef.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    def through(loss):
        return lambda params, u, batch: loss(params, hparams(u), batch)

    response = Implicit(Neumann(4, 0.2))
    in_u = hypergrad(through(case.outer), through(case.inner), response)(
        case.params,
        jnp.ones(3),
        inner_batch=case.inner_batch,
        outer_batch=case.outer_batch,
    )
    return in_u, case.solve(response).grads


@pytest.mark.parametrize("solver", [Dense(), CG(rtol=1e-13), Neumann(3, 0.1)], ids=repr)
def test_jit_changes_rounding_only(solver):
    case = ALL["ridge_data_weights"]
    compiled = jax.jit(lambda: case.solve(Implicit(solver)))()
    plain = case.solve(Implicit(solver))
    assert relative_error(compiled.grads, plain.grads) < 1e-12
    assert int(compiled.result) == int(plain.result)
    assert set(compiled.stats) == set(plain.stats)
