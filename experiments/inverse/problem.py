"""The problems of `inverse`: ridge regression solved exactly, and a network trained to rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from experiments.common import data
from experiments.inverse.config import Config


class Case(NamedTuple):
    """A point at which hypergradients are compared: the minimum w*(lambda), and the data."""

    params: Any
    hparams: Any
    train: dict[str, Any]
    valid: dict[str, Any]


def regression_rows(name: str, seed: int) -> tuple[np.ndarray, ...]:
    """Standardized features, with squares and products of pairs, and targets of two parts."""
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        train, valid = order[: len(y) // 2], order[len(y) // 2 :]
        x_train, y_train, x_valid, y_valid = x[train], y[train], x[valid], y[valid]
    else:
        sets = data.uci_regression(name, split=seed, valid=0.3, seed=seed)
        x_train, y_train, x_valid, y_valid = *sets.train, *sets.valid
    y_mean, y_std = y_train.mean(), y_train.std()
    x_train, x_valid = _standardise(x_train, x_valid)
    x_train, x_valid = _standardise(_second_order(x_train), _second_order(x_valid))
    return x_train, (y_train - y_mean) / y_std, x_valid, (y_valid - y_mean) / y_std


def _second_order(x: np.ndarray) -> np.ndarray:
    left, right = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, left] * x[:, right]], axis=1)


def _standardise(train: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(0), train.std(0)
    varies = std > 1e-8 * np.abs(train).max()  # the square of a binary feature may be constant
    return (train - mean)[:, varies] / std[varies], (valid - mean)[:, varies] / std[varies]


def squared_error(predicted: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Half the mean square, in units of the target's variance."""
    return 0.5 * jnp.mean((predicted - batch["y"]) ** 2)


def penalty(params: Any, hparams: Any) -> jax.Array:
    r""":math:`\tfrac12 \sum_j e^{\lambda_j} w_j^2`, one decay per weight."""
    parts = jax.tree.map(lambda w, lam: 0.5 * jnp.sum(jnp.exp(lam) * w**2), params, hparams)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def linear_model(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """One prediction a row."""
    return batch["x"] @ params


def ridge_inner(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The training loss of the linear case."""
    return squared_error(linear_model(params, None, batch), None, batch) + penalty(params, hparams)


def ridge_outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """Its validation loss."""
    return squared_error(linear_model(params, None, batch), None, batch)


class Exact(NamedTuple):
    """The linear case by dense linear algebra, without the library."""

    hessian: np.ndarray
    inverse_times_g: np.ndarray
    g: np.ndarray
    hypergradient: np.ndarray


def ridge(
    name: str, config: Config, seed: int, condition: float | None = None
) -> tuple[Case, Exact]:
    """The minimizer, its Hessian and the hypergradient in closed form.

    With ``condition``, the log decays are shifted until the Hessian has that condition number.
    """
    x, y, x_valid, y_valid = regression_rows(name, seed)
    hparams = np.random.default_rng(seed + 100).normal(
        config.decay_mean, config.decay_std, x.shape[1]
    )
    gram = x.T @ x / len(y)
    if condition is not None:
        hparams = hparams + _shift(gram, hparams, condition)
    hessian = gram + np.diag(np.exp(hparams))
    params = np.linalg.solve(hessian, x.T @ y / len(y))
    g = x_valid.T @ (x_valid @ params - y_valid) / len(y_valid)
    q = np.linalg.solve(hessian, g)
    case = Case(params, hparams, {"x": x, "y": y}, {"x": x_valid, "y": y_valid})
    return jax.tree.map(jnp.asarray, case), Exact(hessian, q, g, -np.exp(hparams) * params * q)


def _shift(gram: np.ndarray, hparams: np.ndarray, condition: float) -> float:
    """What to add to all log decays; one up to their mean at zero, above which they dominate."""
    from scipy.optimize import root_scalar

    def excess(shift: float) -> float:
        return float(np.log(np.linalg.cond(gram + np.diag(np.exp(hparams + shift))) / condition))

    return float(root_scalar(excess, bracket=(-10.0, -hparams.mean()), method="brentq").root)


def mlp(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """64 pixels, one hidden layer of tanh units, 10 logits."""
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def cross_entropy(logits: jax.Array, hparams: Any, batch: Any) -> jax.Array:
    """Mean over the batch, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def network_outer(params: Any, hparams: Any, batch: Any) -> jax.Array:
    """The validation loss of the network."""
    return cross_entropy(mlp(params, hparams, batch), hparams, batch)


def gauss_newton(damping: float) -> bilevel.GaussNewton:
    """The curvature of the network without its second derivatives; `.loss` is the inner loss."""
    return bilevel.GaussNewton(mlp, cross_entropy, damping, penalty)


def network(config: Config, seed: int) -> Case:
    """Digits and a network trained on them by L-BFGS until its gradient vanishes."""
    from jax.flatten_util import ravel_pytree
    from scipy.optimize import minimize

    sets = data.digits(valid=config.valid, test=1797 - config.valid - config.train, seed=seed)
    train, valid = (
        {"x": jnp.asarray(part.x.reshape(-1, 64), float), "y": jnp.asarray(part.y)}
        for part in (sets.train, sets.valid)
    )
    first, second = jax.random.split(jax.random.key(seed))
    start = {
        "w1": jax.random.normal(first, (64, config.hidden)) / 8,
        "b1": jnp.zeros(config.hidden),
        "w2": jax.random.normal(second, (config.hidden, 10)) / config.hidden**0.5,
        "b2": jnp.zeros(10),
    }
    hparams = jax.tree.map(lambda w: jnp.full_like(w, config.log_decay), start)
    flat, unravel = ravel_pytree(start)
    loss = gauss_newton(0.0).loss
    value_and_grad = jax.jit(jax.value_and_grad(lambda w: loss(unravel(w), hparams, train)))
    result = minimize(
        lambda w: tuple(np.asarray(part, np.float64) for part in value_and_grad(w)),
        np.asarray(flat),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": config.iterations, "maxfun": 2 * config.iterations}
        | {"gtol": 1e-9, "ftol": 0.0, "maxcor": 30},
    )
    return Case(unravel(jnp.asarray(result.x)), hparams, train, valid)
