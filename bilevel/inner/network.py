r"""Best-response networks in weight space: how the weights of *any* model follow :math:`d`.

A network maps parameters ``base``, its own parameters :math:`φ` and a displacement
:math:`d` of the hyperparameters to parameters of the same tree, which any loss can read. No
layer is touched, and no matrix product is doubled: the response is added to the weights once.

What :math:`d` is decides the method (:attr:`centred`): the distance from the current
hyperparameters, :math:`λ' - λ`, in Delta-STN, where :math:`d = 0` is the plain
model; :math:`λ'` itself in STN.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Hparams, Key, Params
from bilevel.ground.leaves import select
from bilevel.ground.settings import check_real
from bilevel.ground.tree import accumulator_dtype, paths, size

Axes = int | tuple[int, ...]


@runtime_checkable
class Network(Protocol):
    """Anything with these is a network: see :class:`StructuredResponse`."""

    @property
    def centred(self) -> bool: ...

    def init(self, key: Key, params: Params, hparams: Hparams) -> Any: ...

    def apply(self, network_params: Any, params: Params, displacement: Hparams, /) -> Params: ...


def gradient_cost(network: Network, learns: int) -> float:
    """Inner gradients that one of displaced weights is worth (see ``Cost``).

    ``learns``: of the base weights and the network, how many it is taken in (0, 1 or 2).
    """
    return (4 + learns) / 3 if getattr(network, "per_example", False) else 1.0


class StructuredParams(NamedTuple):
    """Parameters of a :class:`StructuredResponse`, by the path of the leaf they move.

    Attributes:
      weights: :math:`R`, shaped like the leaf; only for leaves of two axes or more.
      gains: :math:`U`, ``(H, out)``.
    """

    weights: dict[str, jax.Array]
    gains: dict[str, jax.Array]


def fan_in_uniform(key: Key, shape: Sequence[int], dtype: Any) -> jax.Array:
    r""":math:`U(-1/\sqrt{f}, 1/\sqrt{f})` with the fan-in :math:`f` of a kernel ``(..., out)``."""
    fan_in = max(int(np.prod(shape[:-1])), 1)
    return jax.random.uniform(key, tuple(shape), dtype, -1.0, 1.0) / np.sqrt(fan_in).astype(dtype)


def flatten_hparams(hparams: Hparams) -> jax.Array:
    """All hyperparameters as one vector ``(H,)``, in at least float32."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(hparams)]
    dtype = accumulator_dtype(jnp.result_type(*leaves))
    return jnp.concatenate([x.reshape(-1).astype(dtype) for x in leaves])


@dataclasses.dataclass(frozen=True)
class StructuredResponse:
    r"""The response of every weight to the hyperparameters, by one gain per output unit:

    .. math::
        P(d) = P + R ⊙ (d U)  \text{(kernels)},
        b(d) = b + d U  \text{(vectors and scalars)}

    with :math:`d U` laid along the output axis. This is the gate of Self-Tuning Networks
    written on the weights, so it serves dense, convolution, embedding, recurrent and
    normalization leaves alike. Vectors have no :math:`R`: it would only rescale :math:`U`.

    Args:
      centred: True: :math:`d = λ' - λ`, and :math:`P` are the plain model's weights
        (Delta-STN). False: :math:`d = λ'`, weights and response trained together (STN).
      output_axes: where the output units lie: an axis (or several, as ``(-2, -1)`` for the
        heads of an attention kernel), or a function ``(path, shape) -> axes``. The last axis
        is right for flax; ``0`` for equinox kernels.
      leaves: parts of the paths of the leaves that respond (``"kernel"``); ``None`` for all.
      gain_scale: standard deviation of the first :math:`U`; 0 starts from no response (then
        :math:`R` moves only after :math:`U` has).
      weights_init: ``(key, shape, dtype) -> array`` for :math:`R`, output axis last or not.

    Cost: one multiply-add a weight and displacement; memory :math:`n + H ·` units.

    Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel
    Optimization of Hyperparameters using Structured Best-Response Functions", 2019; Bae and
    Grosse, "Delta-STN: Efficient Bilevel Optimization for Neural Networks using Structured
    Response Jacobians", 2020.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> network = bilevel.StructuredResponse()
      >>> weights = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> phi = network.init(jax.random.key(0), weights, jnp.zeros(()))
      >>> sorted(phi.gains), phi.gains["['kernel']"].shape
      (["['bias']", "['kernel']"], (1, 2))
    """

    centred: bool = True
    output_axes: Axes | Callable[[str, tuple[int, ...]], Axes] = -1
    leaves: str | tuple[str, ...] | None = None
    gain_scale: float = 0.0
    weights_init: Callable[..., jax.Array] = fan_in_uniform

    def __post_init__(self) -> None:
        check_real("gain_scale", self.gain_scale, 0)
        if isinstance(self.leaves, list):
            raise TypeError("`leaves` must be a string or a tuple of strings, got a list.")

    def init(self, key: Key, params: Params, hparams: Hparams) -> StructuredParams:
        """First :class:`StructuredParams`; leaves of ``params`` may be ``ShapeDtypeStruct``.

        Raises:
          ValueError: no leaf has a name in ``leaves``, or an output axis is out of range.
        """
        count = size(hparams)
        weights, gains = {}, {}
        for index, (path, leaf) in enumerate(select(params, self.leaves)):
            shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
            axes = self._axes(path, shape)
            units = tuple(shape[axis] for axis in axes)
            weights_key, gains_key = jax.random.split(jax.random.fold_in(key, index))
            gain = jnp.zeros((count, int(np.prod(units))), accumulator_dtype(dtype))
            if self.gain_scale:
                gain = self.gain_scale * jax.random.normal(gains_key, gain.shape, gain.dtype)
            gains[path] = gain
            if len(shape) > 1:
                # Initializers take the output axis last; lay it there, draw, and move it back.
                order = [a for a in range(len(shape)) if a not in axes] + list(axes)
                inputs = [shape[a] for a in order[: len(shape) - len(axes)]]
                flat = self.weights_init(weights_key, (*inputs, int(np.prod(units))), dtype)
                drawn = flat.reshape([shape[a] for a in order])
                weights[path] = jnp.transpose(drawn, np.argsort(order).tolist())
        return StructuredParams(weights, gains)

    def apply(
        self, network_params: StructuredParams, params: Params, displacement: Hparams
    ) -> Params:
        """The weights at ``displacement``, a tree like the hyperparameters; ``params`` at 0."""
        d = flatten_hparams(displacement)
        leaves = []
        for path, leaf in paths(params, ""):
            if path not in network_params.gains:
                leaves.append(leaf)
                continue
            leaves.append(
                leaf + self._delta(path, jnp.shape(leaf), network_params, d).astype(leaf.dtype)
            )
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def _axes(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape:
            return ()
        axes = self.output_axes
        axes = axes(path, shape) if callable(axes) else axes
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        if len(shape) == 1:
            return (0,)
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(
                f"`output_axes` {axes} is out of range for {path or 'the leaf'}, of shape {shape}."
            )
        return tuple(sorted(axis % len(shape) for axis in axes))

    def _delta(
        self, path: str, shape: tuple[int, ...], network_params: StructuredParams, d: jax.Array
    ) -> jax.Array:
        gains = network_params.gains[path]
        if gains.shape[0] != d.size:
            raise ValueError(
                f"the response of {path} was made for {gains.shape[0]} hyperparameters, got "
                f"{d.size}: make it with `init(key, params, hparams)` of this problem."
            )
        axes = self._axes(path, shape)
        along = tuple(s if i in axes else 1 for i, s in enumerate(shape))
        gate = (d.astype(gains.dtype) @ gains).reshape(along)
        if path not in network_params.weights:
            return gate
        weights = network_params.weights[path]
        return weights * gate.astype(weights.dtype)
