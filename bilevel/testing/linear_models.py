r"""Cases with a model linear in its parameters: ridge, logistic and softmax regression.

``params`` is ``{"bias", "kernel"}``, flattened in this order, so the flat design matrix is
:math:`[1, X]`; features have means away from zero, by which the Hessian couples the two leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem.operators.gauss_newton import GaussNewton
from bilevel.problem.operators.linear_model import LinearModel
from bilevel.testing.case import (
    Case,
    Exact,
    add_direct,
    direct_grads,
    draw,
    flatten,
    newton,
    unflatten,
)

LINEAR = frozenset(
    {"convex", "gauss_newton", "gauss_newton_exact", "linear_model", "separable_penalty"}
)


def _features(rng: np.random.Generator, examples: int, features: int) -> np.ndarray:
    return draw(rng, examples, features) + draw(rng, 1, features)


def _design(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


def _squares(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    return jnp.sum((z - batch[1]) ** 2) / (2 * z.shape[0])


def _penalty(params: Any, hparams: Any) -> jax.Array:
    """One log-penalty for all parameters, or a tree with one for each."""
    if jax.tree.structure(hparams) != jax.tree.structure(params):
        hparams = jax.tree.map(lambda _: hparams, params)
    terms = jax.tree.map(lambda w, lam: jnp.sum(jnp.exp(lam) * w**2) / 2, params, hparams)
    leaves = jax.tree.leaves(terms)
    return jnp.sum(jnp.stack(leaves))


def _cross_of_penalty(w: np.ndarray, lam: np.ndarray) -> np.ndarray:
    return (np.exp(lam[0]) * w)[:, None] if len(lam) == 1 else np.diag(np.exp(lam) * w)


def _build(
    rng: np.random.Generator,
    name: str,
    operator: GaussNewton,
    data: tuple[Any, ...],
    hparams: Any,
    like: Any,
    closed_form: Any,
    outer_loss: Any,
    tags: frozenset[str] = LINEAR,
) -> Case:
    """A case from its closed form ``(lam, direction) -> Exact``."""
    direction = draw(rng, len(flatten(like)))

    def exact(lam: np.ndarray) -> Exact:
        return closed_form(lam, direction)

    def data_loss(params: Any, hparams: Any, batch: Any) -> jax.Array:
        return outer_loss(operator.model(params, hparams, batch), hparams, batch)

    return Case(
        name=name,
        inner=operator.loss,
        outer=add_direct(data_loss, unflatten(direction, like)),
        params=unflatten(exact(flatten(hparams)).params, like),
        hparams=hparams,
        inner_batch=jax.tree.map(jnp.asarray, data[0]),
        outer_batch=jax.tree.map(jnp.asarray, data[1]),
        exact=exact,
        tags=tags | {"swappable"},
        gauss_newton=operator,
    )


def _linear_model() -> LinearModel:
    return LinearModel(lambda hparams, batch: batch[0])


def _vector_like(features: int) -> dict[str, jax.Array]:
    return {"bias": jnp.zeros(()), "kernel": jnp.zeros(features)}


def _least_squares(data: Any, lam: np.ndarray, direction: np.ndarray, form: Any) -> Exact:
    """Exact quantities of a ridge problem; ``form(A, y, lam)`` gives H, the right side, B."""
    (x, y), (xv, yv) = data
    design, outer_design = _design(x), _design(xv)
    hessian, target, cross = form(design, y, lam)
    w = np.linalg.solve(hessian, target)
    through, direct = direct_grads(direction, w, lam)
    g = outer_design.T @ (outer_design @ w - yv) / len(yv) + through
    return Exact(w, hessian, cross(w), g, direct)


def ridge_cases(rng: np.random.Generator) -> list[Case]:
    r"""Ridge regression tuned through its penalty, its data weights and its labels.

    :math:`h = |Xw - y|^2/2n + ½ ∑_j e^{λ_j} w_j^2`, with one penalty or one for
    each parameter; :math:`\tfrac1{2n}∑_i σ(λ_i)(x_iᵀ w - y_i)^2 + c|w|^2/2`;
    and :math:`λ = y`.
    """
    n, d, ridge = 9, 4, 0.3
    like = _vector_like(d)

    def data() -> tuple[Any, Any]:
        return (_features(rng, n, d), draw(rng, n)), (_features(rng, n, d), draw(rng, n))

    def gram(a: np.ndarray) -> np.ndarray:
        return a.T @ a / len(a)

    def penalized(a: np.ndarray, y: np.ndarray, lam: np.ndarray) -> Any:
        weights = np.broadcast_to(np.exp(lam), a.shape[1])
        return gram(a) + np.diag(weights), a.T @ y / n, lambda w: _cross_of_penalty(w, lam)

    def weighted(a: np.ndarray, y: np.ndarray, lam: np.ndarray) -> Any:
        s = 1 / (1 + np.exp(-lam))
        hessian = (a.T * s) @ a / n + ridge * np.eye(a.shape[1])
        slope = s * (1 - s)
        return hessian, a.T @ (s * y) / n, lambda w: a.T * (slope * (a @ w - y)) / n

    def labelled(a: np.ndarray, y: np.ndarray, lam: np.ndarray) -> Any:
        return gram(a) + ridge * np.eye(a.shape[1]), a.T @ lam / n, lambda w: -a.T / n

    def weighted_squares(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum(jax.nn.sigmoid(hparams) * (z - batch[1]) ** 2) / (2 * z.shape[0])

    def squares_to_labels(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum((z - hparams) ** 2) / (2 * z.shape[0])

    def fixed_ridge(params: Any, hparams: Any) -> jax.Array:
        squares = [jnp.sum(w**2) for w in jax.tree.leaves(params)]
        return ridge / 2 * jnp.sum(jnp.stack(squares))

    per_weight = {"bias": jnp.asarray(-0.4), "kernel": jnp.asarray(draw(rng, d, scale=0.5) - 0.7)}
    rows = [
        ("ridge_scalar", _squares, _penalty, jnp.asarray(-0.7), penalized),
        ("ridge_per_feature", _squares, _penalty, per_weight, penalized),
        ("ridge_data_weights", weighted_squares, fixed_ridge, jnp.asarray(draw(rng, n)), weighted),
        ("ridge_labels", squares_to_labels, fixed_ridge, jnp.asarray(draw(rng, n)), labelled),
    ]
    cases = []
    for name, output_loss, penalty, hparams, form in rows:
        batches = data()

        def closed_form(
            lam: Any, direction: Any, batches: Any = batches, form: Any = form
        ) -> Exact:
            return _least_squares(batches, lam, direction, form)

        operator = GaussNewton(_linear_model(), output_loss, penalty=penalty)
        cases.append(
            _build(
                rng,
                name,
                operator,
                batches,
                hparams,
                like,
                closed_form,
                _squares,
                LINEAR | {"quadratic"},
            )
        )
    return cases


def multi_output_case(rng: np.random.Generator) -> Case:
    r"""Fewer outputs than parameters, coupled by a matrix that is tuned: the push-through case.

    :math:`h = \tfrac1{2b}∑_i r_iᵀ Q(λ) r_i + e^{λ_0}|W|^2/2` with
    :math:`r_i = Wᵀ x_i - y_i` and :math:`Q = S + diag(e^{λ})`.
    """
    b, d, c = 3, 4, 2
    root = draw(rng, c, c)
    mixing = root @ root.T / 2
    data = ((_features(rng, b, d), draw(rng, b, c)), (_features(rng, b, d), draw(rng, b, c)))
    like = {"bias": jnp.zeros(c), "kernel": jnp.zeros((d, c))}
    hparams = {"output": jnp.asarray(draw(rng, c, scale=0.5)), "penalty": jnp.asarray(-1.2)}

    def closed_form(lam: np.ndarray, direction: np.ndarray) -> Exact:
        (x, y), (xv, yv) = data
        a, av = _design(x), _design(xv)
        q_matrix, penalty = mixing + np.diag(np.exp(lam[:c])), np.exp(lam[c])
        hessian = np.kron(a.T @ a / b, q_matrix) + penalty * np.eye((1 + d) * c)
        w = np.linalg.solve(hessian, (a.T @ y @ q_matrix / b).ravel())
        residual = a @ w.reshape(1 + d, c) - y
        columns = [
            (a.T @ (residual * np.exp(lam[k]) * (np.arange(c) == k)) / b).ravel() for k in range(c)
        ]
        cross = np.stack([*columns, penalty * w], axis=1)
        through, direct = direct_grads(direction, w, lam)
        g = (av.T @ (av @ w.reshape(1 + d, c) - yv) / b).ravel() + through
        return Exact(w, hessian, cross, g, direct)

    def output_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        residual = z - batch[1]
        q_matrix = jnp.asarray(mixing).astype(z.dtype) + jnp.diag(jnp.exp(hparams["output"]))
        return jnp.sum((residual @ q_matrix) * residual) / (2 * z.shape[0])

    def penalty(params: Any, hparams: Any) -> jax.Array:
        return _penalty(params, hparams["penalty"])

    operator = GaussNewton(_linear_model(), output_loss, penalty=penalty)
    return _build(
        rng,
        "multi_output",
        operator,
        data,
        hparams,
        like,
        closed_form,
        _squares,
        LINEAR | {"quadratic"},
    )


def logistic_cases(rng: np.random.Generator) -> list[Case]:
    r"""Logistic regression, :math:`∑_i log(1 + e^{-y_i x_iᵀ w})` and the two penalties."""
    n, d = 12, 3
    like = _vector_like(d)

    def output_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        return jnp.sum(jax.nn.softplus(-batch[1] * z))

    def slope(a: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 1 / (1 + np.exp(y * (a @ w)))
        return -a.T @ (y * p), (a.T * (p * (1 - p))) @ a

    def solved(data: Any, lam: np.ndarray, direction: np.ndarray) -> Exact:
        (x, y), (xv, yv) = data
        a, weights = _design(x), np.broadcast_to(np.exp(lam), 1 + d)

        def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gradient, curvature = slope(a, y, w)
            return gradient + weights * w, curvature + np.diag(weights)

        w = newton(derivatives, np.zeros(1 + d))
        through, direct = direct_grads(direction, w, lam)
        g = slope(_design(xv), yv, w)[0] + through
        return Exact(w, derivatives(w)[1], _cross_of_penalty(w, lam), g, direct)

    per_weight = {"bias": jnp.asarray(0.2), "kernel": jnp.asarray(draw(rng, d, scale=0.5))}
    cases = []
    for name, hparams in (
        ("logistic_scalar", jnp.asarray(0.3)),
        ("logistic_per_feature", per_weight),
    ):
        data = tuple(
            (_features(rng, n, d), np.sign(draw(rng, n) + 0.1 * draw(rng, n))) for _ in range(2)
        )

        def closed_form(lam: Any, direction: Any, data: Any = data) -> Exact:
            return solved(data, lam, direction)

        operator = GaussNewton(_linear_model(), output_loss, penalty=_penalty)
        cases.append(_build(rng, name, operator, data, hparams, like, closed_form, output_loss))
    return cases


def softmax_case(rng: np.random.Generator) -> Case:
    """Multinomial logistic regression with one log-penalty per weight and integer labels."""
    n, d, c = 10, 3, 3
    like = {"bias": jnp.zeros(c), "kernel": jnp.zeros((d, c))}
    data = tuple((_features(rng, n, d), rng.permutation(np.arange(n) % c)) for _ in range(2))
    hparams = unflatten(draw(rng, (1 + d) * c, scale=0.5) - 1.5, like)

    def output_loss(z: jax.Array, hparams: Any, batch: Any) -> jax.Array:
        rows = jnp.take_along_axis(jax.nn.log_softmax(z), batch[1][:, None], axis=1)
        return -jnp.mean(rows)

    def slope(a: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = a @ w.reshape(1 + d, c)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        blocks = p[:, :, None] * (np.eye(c) - p[:, None, :])
        curvature = np.sum(
            [np.kron(np.outer(row, row), q) for row, q in zip(a, blocks, strict=True)], axis=0
        )
        return (a.T @ (p - np.eye(c)[y])).ravel() / n, curvature / n

    def closed_form(lam: np.ndarray, direction: np.ndarray) -> Exact:
        (x, y), (xv, yv) = data

        def derivatives(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            gradient, curvature = slope(_design(x), y, w)
            return gradient + np.exp(lam) * w, curvature + np.diag(np.exp(lam))

        w = newton(derivatives, np.zeros((1 + d) * c))
        through, direct = direct_grads(direction, w, lam)
        g = slope(_design(xv), yv, w)[0] + through
        return Exact(w, derivatives(w)[1], _cross_of_penalty(w, lam), g, direct)

    operator = GaussNewton(_linear_model(), output_loss, penalty=_penalty)
    return _build(
        rng, "softmax_per_weight", operator, data, hparams, like, closed_form, output_loss
    )
