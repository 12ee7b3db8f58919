r"""Cases whose inner problem is not a smooth loss: fixed points, roots, composite conditions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.problem.conditions import Composite, FixedPoint, Root
from bilevel.regularizers.prox import l1
from bilevel.testing.case import Case, Exact, add_direct, direct_grads, draw, flatten, unflatten


def _vector(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def _outer(rng: np.random.Generator, n: int, like: Any) -> tuple[Any, Any, Any]:
    """A quadratic outer loss with a direct term, its batch, and its two gradients in NumPy."""
    root, target, direction = draw(rng, n, n), draw(rng, n), draw(rng, n)

    def loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.sum((batch[0] @ _vector(params) - batch[1]) ** 2)

    def grads(w: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        through, direct = direct_grads(direction, w, lam)
        return root.T @ (root @ w - target) + through, direct

    batch = (jnp.asarray(root), jnp.asarray(target))
    return add_direct(loss, unflatten(direction, like)), batch, grads


def equilibrium_case(rng: np.random.Generator) -> Case:
    r"""The equilibrium :math:`w = M w + Cλ + c` of a map that contracts, not symmetric."""
    n, p = 5, 3
    m, c, shift = draw(rng, n, n), draw(rng, n, p), draw(rng, n)
    m *= 0.6 / np.linalg.norm(m, 2)
    like = {"a": jnp.zeros(2), "b": jnp.zeros((3, 1))}
    outer, outer_batch, grads = _outer(rng, n, like)

    def step(params: Any, hparams: Any, batch: Any) -> Any:
        unravel = ravel_pytree(params)[1]
        return unravel(batch[0] @ _vector(params) + batch[1] @ _vector(hparams) + batch[2])

    def exact(lam: np.ndarray) -> Exact:
        w = np.linalg.solve(np.eye(n) - m, c @ lam + shift)
        return Exact(w, np.eye(n) - m, -c, *grads(w, lam))

    hparams = (jnp.asarray(draw(rng, 1)), {"x": jnp.asarray(draw(rng, p - 1))})
    return _case(
        "equilibrium", FixedPoint(step), exact, like, hparams, (m, c, shift), outer, outer_batch
    )


def kkt_case(rng: np.random.Generator) -> Case:
    r"""Ridge regression on a plane, with its multiplier: the root of its KKT conditions."""
    n, p = 4, 3
    x, y, a = draw(rng, 12, n), draw(rng, 12), draw(rng, n)
    like = {"nu": jnp.zeros(1), "w": jnp.zeros(n)}
    outer, outer_batch, grads = _outer(rng, n + 1, like)

    def equation(params: Any, hparams: Any, batch: Any) -> Any:
        x, y, a = batch
        w, lam = params["w"], _vector(hparams)
        slope = x.T @ (x @ w - y) / 12 + jnp.exp(lam[0]) * w - lam[1] + a * params["nu"]
        # Twice the constraint: no symmetric system.
        return {"nu": 2 * (a @ w - lam[2])[None], "w": slope}

    def exact(lam: np.ndarray) -> Exact:
        h = x.T @ x / 12 + np.exp(lam[0]) * np.eye(n)
        matrix = np.block([[np.zeros((1, 1)), 2 * a[None]], [a[:, None], h]])
        right = np.r_[2 * lam[2], x.T @ y / 12 + lam[1]]
        solution = np.linalg.solve(matrix, right)
        cross = np.zeros((n + 1, p))
        cross[0, 2], cross[1:, 0], cross[1:, 1] = -2, np.exp(lam[0]) * solution[1:], -1
        return Exact(solution, matrix, cross, *grads(solution, lam))

    hparams = (jnp.asarray(draw(rng, 1)), {"x": jnp.asarray(draw(rng, p - 1))})
    return _case("kkt", Root(equation), exact, like, hparams, (x, y, a), outer, outer_batch)


def lasso_case(rng: np.random.Generator, ridge: float = 0.0) -> Case:
    r"""The lasso with one strength per weight, or an elastic net whose ridge is in its operator.

    With a ridge the Jacobian of the operator is no projector: :math:`J = (1 + s b)^{-1}` on the
    support.
    """
    n, s = 6, 0.4
    x = draw(rng, 30, n)
    y = x @ np.array([1.0, -1.0, 0.5, 0.8, -0.5, -1.2]) + draw(rng, 30)
    like = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    outer, outer_batch, grads = _outer(rng, n, like)

    def loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean((batch[0] @ _vector(params) - batch[1]) ** 2)

    def prox(params: Any, hparams: Any, step_size: Any) -> Any:
        soft = l1(params, jax.tree.map(jnp.exp, hparams), step_size)
        return jax.tree.map(lambda w: w / (1 + step_size * ridge), soft)

    h = x.T @ x / 30

    def exact(lam: np.ndarray) -> Exact:
        w = np.zeros(n)
        for _ in range(3000):  # proximal steps, to rounding
            v = w - s * (h @ w - x.T @ y / 30)
            w = np.sign(v) * np.maximum(np.abs(v) - s * np.exp(lam), 0) / (1 + s * ridge)
        inside = (w != 0) / (1 + s * ridge)
        jacobian = (np.eye(n) - inside[:, None] * (np.eye(n) - s * h)) / s
        return Exact(w, jacobian, np.diag(inside * np.sign(w) * np.exp(lam)), *grads(w, lam))

    # Some strengths hold their weights at zero, well off the threshold.
    hparams = unflatten(np.array([-2.5, -2.0, 1.0, -3.0, 0.7, -2.2]), like)
    return _case(
        "elastic_net" if ridge else "lasso", Composite(loss, prox, s), exact, like, hparams,
        (x, y), outer, outer_batch, "symmetric",
    )  # fmt: skip


def _case(
    name: str, condition: Any, exact: Any, like: Any, hparams: Any, batch: Any, outer: Any,
    outer_batch: Any, *tags: str,
) -> Case:  # fmt: skip
    return Case(
        name=name,
        inner=condition,
        outer=outer,
        params=unflatten(exact(flatten(hparams)).params, like),
        hparams=hparams,
        inner_batch=jax.tree.map(jnp.asarray, batch),
        outer_batch=outer_batch,
        exact=exact,
        tags=frozenset({"condition", *tags}),
    )
