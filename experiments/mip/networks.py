"""The hypernetworks, and their training."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel
from bilevel.ground import tree
from bilevel.ground.tree import paths
from bilevel.inner.hypernetwork import Encoding, encode
from experiments.common import budget
from experiments.mip import tasks
from experiments.mip.config import Config, Task

# encoding of the input, and whether base weights are added
VARIANTS: dict[str, tuple[Encoding, bool]] = {
    "plain": ("raw", False),
    "he": ("raw", False),  # plain, with heads scaled so that it predicts He's sizes
    "encoding": ("cos_sin", False),
    "residual": ("raw", True),
    "mip": ("cos_sin", True),
}
MOMENTUM = 0.9


class HeScaled(bilevel.Hypernetwork):
    """Heads whose first predictions, at an input of one, have the sizes of He's weights.

    Unscaled heads divide by the root of the number of all weights: what they predict is too small
    for a gradient to come through a deep network.
    """

    def init(self, key: Any, params: Any, hparams: Any) -> Any:
        """First parameters, the kernels of the heads scaled layer by layer."""
        made = super().init(key, params, hparams)
        seen = jnp.linalg.norm(self.features(made, jnp.ones_like(hparams)))
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        leaves = dict(paths(params, ""))
        heads = {
            path: (kernel * _he(leaves[path]) * math.sqrt(total) / seen, bias)
            if leaves[path].ndim == 2
            else (kernel, bias)
            for path, (kernel, bias) in made.heads.items()
        }
        return made._replace(heads=heads)


def _he(kernel: Any) -> float:
    return math.sqrt(2 / kernel.shape[0])


def hypernetwork(variant: str, task: Task) -> bilevel.Hypernetwork:
    """Leaky ReLU, He's first weights, biases of zero; what differs is the two parts of MIP."""
    encoding, residual = VARIANTS[variant]
    kind = HeScaled if variant == "he" else bilevel.Hypernetwork
    return kind(task.hidden, encoding=encoding, residual=residual, to_unit=to_unit(variant, task))


def to_unit(variant: str, task: Task) -> Callable[[jax.Array], jax.Array]:
    """The input as the network takes it: raw, or in [0, 1] to be encoded."""
    low, high = tasks.input_range(task)
    if VARIANTS[variant][0] == "raw":
        return lambda x: x
    return lambda x: (x - low) / (high - low)


def step_cost(task: Task) -> float:
    """G of a step: a gradient for every draw. There is no outer gradient: nothing is searched."""
    return budget.global_response(task.draws, outer=0.0).total


def _no_search(w: Any, lam: jax.Array, batch: Any) -> jax.Array:
    """An outer loss of zero, which costs nothing: the hypernetwork alone is measured."""
    del w, batch
    return jnp.zeros_like(lam)


def algorithm(variant: str, task: Task, tx: optax.GradientTransformation) -> bilevel.Algorithm:
    """Training over inputs drawn from the whole range."""
    low, high = tasks.input_range(task)
    return bilevel.global_response(
        _no_search,
        functools.partial(tasks.training_loss, task),
        hypernetwork(variant, task),
        lambda key, lam: jax.random.uniform(key, (), minval=low, maxval=high),
        tx,
        optax.set_to_zero(),
        draws=task.draws,
    )


@functools.cache
def train(variant: str, optimizer: str, task: Task, config: Config) -> Any:
    """``(rates, key, data) -> (rates, points)``: mean training loss over inputs along each run."""
    low, high = tasks.input_range(task)
    grid = jnp.linspace(low, high, config.grid)

    def one(rate: jax.Array, key: jax.Array, data: Any) -> jax.Array:
        tx = optax.adam(rate) if optimizer == "adam" else optax.sgd(rate, momentum=MOMENTUM)
        loop = algorithm(variant, task, tx)
        base_key, response_key, key = jax.random.split(key, 3)
        first = tasks.initial(task, data[0].shape[1], base_key)
        state = loop.init(first, jnp.float32((low + high) / 2), key=response_key)

        def sample(key: jax.Array) -> Any:
            batch = data
            if task.batch:
                index = jax.random.randint(key, (task.batch,), 0, len(data[1]))
                batch = jax.tree.map(lambda a: a[index], data)
            return jax.tree.map(lambda a: a[None], batch), batch

        def stretch(state: Any, key: jax.Array) -> Any:
            count = task.steps // task.points
            state = bilevel.scan_run(loop, state, sample, count, key=key).state

            def loss(lam: jax.Array) -> jax.Array:
                w = loop.deploy(state, lam)
                inner = functools.partial(tasks.training_loss, task, w, lam)
                if not task.channels:
                    return inner(seen(task, data))
                return jax.lax.map(inner, seen(task, data)).mean()

            losses = jax.lax.map(loss, grid) if task.channels else jax.vmap(loss)(grid)
            return state, losses.mean()

        return jax.lax.scan(stretch, state, jax.random.split(key, task.points))[1]

    # One rate after another: side by side every product would have its own weights.
    return jax.jit(lambda rates, key, data: jax.lax.map(lambda r: one(r, key, data), rates))


def seen(task: Task, data: Any) -> Any:
    """What a loss is measured on; in batches for convolutions, whose windows are large."""
    if task.measured:
        data = jax.tree.map(lambda a: a[: task.measured], data)
    if task.channels:
        data = jax.tree.map(lambda a: a.reshape(-1, task.batch, *a.shape[1:]), data)
    return data


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sizes(variant: str, task: Task, pixels: int, key: jax.Array, lam: jax.Array) -> Any:
    """Norms over ``lam``, before training: of the encoded input, and of what is predicted."""
    network = hypernetwork(variant, task)
    base_key, response_key = jax.random.split(key)
    weights = tasks.initial(task, pixels, base_key)
    response = network.init(response_key, weights, jnp.float32(0))
    zero = jax.tree.map(jnp.zeros_like, weights)  # the base weights are not of the prediction

    def one(lam: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = encode(to_unit(variant, task)(lam)[None], network.encoding)
        return jnp.linalg.norm(seen), tree.norm(network.apply(response, zero, lam))

    return jax.vmap(one)(lam)
