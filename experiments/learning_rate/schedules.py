"""Momentum SGD whose rate and momentum differ by layer and by window of steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = dict[str, jax.Array]
LAYERS = 3  # of both networks


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


def shaped(shape: str, steps: int, setting: dict[str, float]) -> Schedule:
    """What a practitioner would try: a rate for every step, the same for all layers.

    Arguments:
        shape: "constant", "cosine" or "linear"; the latter two rise linearly to the peak, and fall.
        steps: of the run.
        setting: "peak", the highest rate, "momentum"; and for those that fall "warm_up", the part
            of the run in which the rate rises, and "last", the last rate over the peak.
    """
    part = (np.arange(steps) + 0.5) / steps
    curve = np.ones(steps)
    if shape != "constant":
        warm, last = setting["warm_up"], setting["last"]
        fallen = np.clip((part - warm) / (1 - warm), 0, 1)
        left = 1 - fallen if shape == "linear" else 0.5 * (1 + np.cos(np.pi * fallen))
        rise = part / warm if warm > 0 else np.ones(steps)
        curve = np.where(part < warm, rise, last + (1 - last) * left)
    whole = start(LAYERS, steps, 1.0, setting["momentum"])
    return whole | {"log_rate": whole["log_rate"] + jnp.log(setting["peak"] * curve)[None]}


def space(shape: str) -> dict[str, Any]:
    """What is searched of a shape."""
    from optuna.distributions import FloatDistribution

    found: dict[str, Any] = {
        "peak": FloatDistribution(0.005, 1.0, log=True),
        "momentum": (0.01, 0.97),  # exactly zero has no logit
    }
    return found if shape == "constant" else found | {"warm_up": (0.0, 0.3), "last": (0.0, 0.3)}


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
