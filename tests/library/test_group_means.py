"""Means over groups of examples hold the largest directions of Gauss–Newton; EKFAC with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from bilevel import CG, EKFAC, Dense, GaussNewton
from bilevel.problem.layers import groups
from bilevel.problem.two_losses import Problem

N, UNITS = 23, 3
KEYS = jax.random.split(jax.random.key(0), 6)


def network(examples: int = N, convolution: bool = False):
    """An MLP or a small CNN of two layers with biases."""
    shape = (examples, 4, 4, 2) if convolution else (examples, 5)
    batch = (jax.random.normal(KEYS[0], shape), jnp.arange(examples) % UNITS)
    kernel = jax.random.normal(KEYS[1], (3, 3, 2, 4) if convolution else (5, 4)) / 3
    params = [
        (kernel, jnp.ones(4)),
        (jax.random.normal(KEYS[2], (4, UNITS)), jnp.zeros(UNITS)),
    ]

    def model(p, hparams, batch):
        (first, bias), (last, end) = p
        if convolution:
            dims = ("NHWC", "HWIO", "NHWC")
            z = jax.lax.conv_general_dilated(
                batch[0], first, (1, 1), "SAME", dimension_numbers=dims
            )
            z = jnp.tanh(z + jnp.broadcast_to(bias, z.shape)).mean((1, 2))
        else:
            z = jnp.tanh(batch[0] @ first + jnp.broadcast_to(bias, (examples, 4)))
        return z @ last + jnp.broadcast_to(end, (examples, UNITS))

    return model, params, batch


def cross_entropy(z, hparams, batch):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), batch[1][:, None], 1))


def bound(model, params, batch, damping=0.01, loss=cross_entropy):
    operator = GaussNewton(model, loss, damping)
    problem = Problem(operator.loss, operator.loss)
    return operator.bind(problem, params, None, batch, fresh=False).mv


def like(params):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(KEYS[3], flat.shape, flat.dtype))


def gradients(model, params, batch):
    """Those of which M is made, (N, UNITS, weights), with the symmetric root of the softmax."""
    flat, unravel = ravel_pytree(params)
    jacobian = np.asarray(jax.jacrev(lambda w: model(unravel(w), None, batch))(flat))
    p = np.asarray(jax.nn.softmax(model(params, None, batch)))
    hessians = (p[:, :, None] * np.eye(UNITS) - p[:, :, None] * p[:, None]) / len(p)
    values, vectors = np.linalg.eigh(hessians)
    roots = (vectors * np.sqrt(np.maximum(values, 0))[:, None]) @ np.swapaxes(vectors, 1, 2)
    return np.einsum("nij,niw->njw", roots, jacobian)


def means(model, params, batch, size):
    """One vector for each group and unit, from the gradients of all examples."""
    made, z = gradients(model, params, batch), np.asarray(model(params, None, batch))
    order = sorted(range(len(z)), key=lambda n: (z[n].argmax(), z[n].max()))
    parts = [order[i : i + size] for i in range(0, len(z), size)]
    return np.concatenate([made[part].sum(0) / len(part) ** 0.5 for part in parts])


def dense(function, params):
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda e: ravel_pytree(function(unravel(e)))[0])(jnp.eye(flat.size))
    return np.asarray(columns.T)


def relative(got, want) -> float:
    got, want = ravel_pytree(got)[0], ravel_pytree(want)[0]
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def vectors_and_basis(amap, params, rank):
    """What the map tells: its vectors and diagonals, and the turn to the eigenbases, all dense."""
    found = amap.kronecker(None, None)
    bases = [(jnp.linalg.eigh(a)[1], jnp.linalg.eigh(g)[1]) for a, g in found.factors]
    moments, stacks = jax.jit(lambda: found.moments(bases, rank))()
    flat = np.concatenate([b.reshape(rank, -1) for b in stacks], 1)
    diagonal = np.concatenate([s.reshape(-1) for s in moments])

    def turn(v):
        pairs = zip(found.split(v), bases, strict=True)
        return jnp.concatenate([(u.T @ x @ w).reshape(-1) for x, (u, w) in pairs])

    return flat, diagonal, dense(turn, params)


def test_groups_are_neighbours_of_equal_size_in_the_order_of_the_outputs():
    z = jax.random.normal(KEYS[4], (N, UNITS))
    made = groups.group({"z": z})
    order = sorted(range(N), key=lambda n: (z[n].argmax(), z[n].max()))
    np.testing.assert_array_equal(made.order.reshape(-1)[:N], order)
    np.testing.assert_array_equal(made.order.reshape(-1)[N:], N)  # ten groups of three, some empty
    members = np.sum(np.asarray(made.order) < N, -1)
    assert list(members) == [3] * 7 + [2, 0, 0]
    np.testing.assert_allclose(made.scale[:8], members[:8] ** -0.5)
    one = groups.group(jnp.asarray([0.3, -1.0, 0.5]))
    np.testing.assert_array_equal(one.order[:, 0], [1, 0, 2])


@pytest.mark.parametrize("convolution", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_vectors_are_the_means_over_groups_and_below_the_matrix(convolution):
    model, params, batch = network(convolution=convolution)
    amap = bound(model, params, batch)
    want = means(model, params, batch, 3)
    got, _, turn = vectors_and_basis(amap, params, 30)
    np.testing.assert_allclose(turn.T @ (got.T @ got) @ turn, want.T @ want, rtol=0, atol=1e-12)
    scatter = dense(amap.undamped, params) - want.T @ want
    assert np.linalg.eigvalsh(scatter).min() > -1e-12
    assert np.linalg.norm(scatter) > 0.01  # three examples of a group differ


def test_few_vectors_hold_most_of_what_all_hold():
    keys = jax.random.split(KEYS[5], 4)
    kept = [jax.random.normal(keys[0], (3, 4, 5)), jax.random.normal(keys[1], (3, 2, 2))]
    new = [jax.random.normal(keys[2], (6, 4, 5)), jax.random.normal(keys[3], (6, 2, 2))]

    def flat(stacks):
        return np.concatenate([x.reshape(x.shape[0], -1) for x in stacks], 1)

    made = flat(groups.merge(kept, new))
    left, values, right = np.linalg.svd(np.concatenate([flat(kept), flat(new)]))
    best = (right[:3].T * values[:3] ** 2) @ right[:3]
    np.testing.assert_allclose(made.T @ made, best, rtol=0, atol=1e-11)


@pytest.mark.parametrize("multiple", [1.0, 10.0])
def test_the_preconditioner_is_the_inverse_of_its_formula(multiple):
    model, params, batch = network()
    amap, rank = bound(model, params, batch), 5
    stack, diagonal, turn = vectors_and_basis(amap, params, rank)
    inside = diagonal - (stack**2).sum(0) + multiple * 0.01
    want = turn.T @ (np.diag(inside) + stack.T @ stack) @ turn
    prepared = EKFAC(rank=rank, damping_multiple=multiple).prepare(amap, params, None)
    got = dense(jax.jit(prepared.apply), params)
    np.testing.assert_allclose(got @ want, np.eye(len(want)), rtol=0, atol=1e-9)
    # in these bases the diagonal is that of the matrix, whatever stands beside it
    matrix = turn @ dense(amap.undamped, params) @ turn.T
    np.testing.assert_allclose(np.diag(matrix), diagonal, rtol=1e-9, atol=1e-14)
    assert int(prepared.num_products) == 2 * UNITS


@pytest.mark.parametrize("convolution", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_it_is_exact_where_every_example_is_a_group(convolution):
    model, params, batch = network(6, convolution)
    amap, g = bound(model, params, batch), like(params)
    got = jax.jit(lambda g: EKFAC(rank=6 * UNITS).solve(amap, g))(g)
    assert relative(got.value, Dense().solve(amap, g).value) < 1e-9
    assert int(got.result) == 0
    plain = jax.jit(lambda g: EKFAC().solve(amap, g).value)(g)
    assert relative(plain, got.value) > 0.1  # what couples the layers is in the vectors alone


def test_it_saves_products():
    model, params, batch = network(200)
    amap, g = bound(model, params, batch, damping=1e-4), like(params)

    def products(rank):
        solver = CG(100, rtol=1e-2, preconditioner=EKFAC(rank=rank, damping_multiple=1.0))
        got = jax.jit(lambda g: solver.solve(amap, g))(g)
        assert int(got.result) == 0
        return int(got.stats["num_matvecs"]) - 2 * UNITS

    assert products(10) < products(0)


def test_errors_of_groups():
    model, params, batch = network()
    with pytest.raises(ValueError, match="`rank`=4 needs the same columns"):
        EKFAC(num_samples=2, rank=4)

    def flat(p, hparams, batch):
        rows = batch[0].reshape(-1, 1) @ p[:1]
        return rows.reshape(N, -1) @ jnp.ones((5 * 2, UNITS))

    def outputs(p, hparams, batch):
        z = model(p, hparams, batch)
        return {"first": z, "second": z[:2]}

    def sum_of(z, hparams, batch):
        return sum(0.5 * jnp.sum(x**2) for x in jax.tree.leaves(z))

    kernel = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=r"groups the examples.*23 in the outputs.*115 rows"):
        EKFAC(rank=4).solve(bound(flat, kernel, batch, loss=sum_of), kernel)
    with pytest.raises(ValueError, match=r"groups the examples.*\(23, 3\), \(2, 3\)"):
        EKFAC(rank=4).solve(bound(outputs, params, batch, loss=sum_of), params)
