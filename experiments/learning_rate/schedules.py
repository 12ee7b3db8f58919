"""Momentum SGD whose rate and momentum differ by layer and by window of steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = dict[str, jax.Array]


class State(NamedTuple):
    """Steps made, and one velocity for each layer."""

    count: jax.Array
    velocity: Any


def start(layers: int, windows: int, rate: float, momentum: float) -> Schedule:
    """The same rate and momentum everywhere: unconstrained numbers, (layers, windows)."""
    shape = (layers, windows)
    logit = jnp.log(momentum) - jnp.log1p(-momentum)
    return {
        "log_rate": jnp.full(shape, jnp.log(rate), jnp.float32),
        "momentum": jnp.full(shape, logit, jnp.float32),
    }


def sgd(schedule: Schedule, every: int) -> optax.GradientTransformation:
    r""":math:`v_l \leftarrow m_{l,t} v_l + \nabla_l, \; w_l \leftarrow w_l - a_{l,t} v_l`.

    Parameters are a list with one entry per layer. The state counts the steps, so a run may be cut
    into calls; steps past the last window use the last one.
    """

    def init(params: Any) -> State:
        return State(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, State]:
        window = jnp.minimum(state.count // every, schedule["log_rate"].shape[1] - 1)
        rates = jnp.exp(schedule["log_rate"][:, window])
        momenta = jax.nn.sigmoid(schedule["momentum"][:, window])

        def blend(i: int, v: Any, g: Any) -> Any:
            return jax.tree.map(lambda v, g: momenta[i] * v + g, v, g)

        pairs = zip(state.velocity, updates, strict=True)
        velocity = [blend(i, v, g) for i, (v, g) in enumerate(pairs)]
        moves = [
            jax.tree.map(lambda v, rate=rates[i]: -rate * v, layer)
            for i, layer in enumerate(velocity)
        ]
        return moves, State(state.count + 1, velocity)

    return optax.GradientTransformation(init, update)
