"""A small network whose log decays are the hyperparameters: one for all, or one for each part."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.objectives import HyperPrior
from experiments.many_network.config import Config

GRANULARITY = ("feature", "unit", "weight")
CLASSES = 10
Params = dict[str, jax.Array]


def initial(key: jax.Array, inputs: int, hidden: int) -> Params:
    """Fresh parameters of a network inputs - hidden - 10."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (inputs, hidden)) / inputs**0.5,
        "b1": jnp.zeros(hidden),
        "w2": jax.random.normal(second, (hidden, CLASSES)) / hidden**0.5,
        "b2": jnp.zeros(CLASSES),
    }


def outputs(params: Params, x: jax.Array) -> jax.Array:
    """Logits (N, 10) from (N, inputs)."""
    x = jnp.tanh(x @ params["w1"] + params["b1"][None, :])
    return x @ params["w2"] + params["b2"][None, :]


def losses(params: Params, rows: Any) -> jax.Array:
    """Cross-entropy of each row, in nats."""
    x, y = rows
    return optax.softmax_cross_entropy_with_integer_labels(outputs(params, x), y)


def error(params: Params, rows: Any) -> jax.Array:
    """Share of the rows that are classified wrongly."""
    x, y = rows
    return jnp.mean(jnp.argmax(outputs(params, x), -1) != y)


def penalty(params: Params, lam: Params) -> jax.Array:
    r""":math:`\tfrac12\sum_j e^{\lambda_j} w_j^2`, with a log decay for each weight."""
    terms = [0.5 * jnp.sum(jnp.exp(lam[name]) * w**2) for name, w in params.items()]
    return jnp.sum(jnp.stack(terms))


def places(granularity: str, inputs: int, hidden: int) -> dict[str, np.ndarray]:
    """Which of the log decays, all in one row, each weight has.

    ``tensor``: one for each kernel and each bias. ``feature``: one for the weights that leave an
    input, and one for each other tensor. ``unit``: one for the weights that enter a hidden unit,
    one for those that leave it, and one for each bias. ``weight``: one for every weight.
    """
    shapes = {
        "w1": (inputs, hidden), "b1": (hidden,), "w2": (hidden, CLASSES), "b2": (CLASSES,),
    }  # fmt: skip
    shared: dict[str, dict[str, tuple[int, ...]]] = {
        "tensor": dict.fromkeys(shapes, ()),
        "feature": {**dict.fromkeys(shapes, ()), "w1": (inputs, 1)},
        "unit": {**dict.fromkeys(shapes, ()), "w1": (1, hidden), "w2": (hidden, 1)},
        "weight": shapes,
    }
    found, first = {}, 0
    for name, shape in shapes.items():
        mine = shared[granularity][name]
        count = math.prod(mine)
        numbers = first + np.arange(count, dtype=np.int32).reshape(mine)
        found[name], first = np.broadcast_to(numbers, shape), first + count
    return found


def spread_out(lam: jax.Array, place: dict[str, Any]) -> Params:
    """The log decay of each weight."""
    return {name: lam[index] for name, index in place.items()}


def train(params: Params, lam: Params, rows: Any, config: Config) -> Params:
    """Full-batch Adam, its step size falling to zero like a cosine."""
    tx = optax.adam(optax.cosine_decay_schedule(config.inner_rate, config.steps))

    def loss(params: Params, lam: Params, _: None) -> jax.Array:
        return jnp.mean(losses(params, rows)) + penalty(params, lam)

    first = bilevel.InnerState(params, tx.init(params))
    return bilevel.descend(loss, tx, first, lam, None, steps=config.steps)[0].params


def tune(
    params: Params, start: jax.Array, place: Any, prior: HyperPrior, folds: Any, config: Config
) -> jax.Array:
    """Log decays by hypergradients of the cross-validated loss, from ``start``.

    One network per fold, along the leading axis of ``params`` and of both parts of ``folds``. They
    are trained already, and train on while the decays move.
    """
    rows, valid = folds

    # The images are the same in every step: the losses close over them, and are given none.
    def logits(params: Params, moved: Any, _: Any) -> jax.Array:
        return jax.vmap(outputs)(params, rows[0])

    def cross_entropy(logits: jax.Array, moved: Any, _: Any) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, rows[1])
        return jnp.sum(jnp.mean(each, 1))

    def penalized(params: Params, moved: Any) -> jax.Array:
        decays = spread_out(prior.hparams(moved), place)
        return jnp.sum(jax.vmap(penalty, (0, None))(params, decays))

    def outer(params: Params, lam: jax.Array, _: Any) -> jax.Array:
        return jnp.mean(jax.vmap(losses)(params, valid))

    operator = bilevel.GaussNewton(logits, cross_entropy, config.damping, penalized)
    algorithm = bilevel.alternate(
        prior.outer(outer),
        operator.loss,
        bilevel.Implicit(bilevel.CG(max_steps=config.products), operator, certify=False),
        inner_tx=optax.adam(
            optax.cosine_decay_schedule(config.tuning_rate, config.rounds * config.inner_steps)
        ),
        outer_tx=optax.adam(optax.cosine_decay_schedule(config.rate, config.rounds)),
        inner_steps=config.inner_steps,
    )
    none = jnp.zeros((config.inner_steps, 1))

    def step(state: Any, _: None) -> Any:
        return algorithm.step(state, inner_batches=none, outer_batch=none[0])[0], None

    state = algorithm.init(params, prior.init(start))
    state, _ = jax.lax.scan(step, state, length=config.rounds)
    return prior.hparams(state.hparams)
