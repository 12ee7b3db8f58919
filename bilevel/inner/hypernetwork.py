r"""Hypernetworks: a small network that outputs the weights of the model for any hyperparameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Hparams, Key, Params
from bilevel.ground.settings import check_count
from bilevel.ground.tree import accumulator_dtype, paths, size
from bilevel.inner.network import flatten_hparams

Encoding = Literal["raw", "cos_sin", "complement"]


class HypernetworkParams(NamedTuple):
    """Parameters of a :class:`Hypernetwork`.

    Attributes:
      hidden: ``(kernel, bias)`` of each hidden layer.
      heads: ``(kernel, bias)`` by the path of the leaf they predict, flattened; the bias is
        ``None`` where the base weights take its place.
    """

    hidden: tuple[tuple[jax.Array, jax.Array], ...]
    heads: dict[str, tuple[jax.Array, jax.Array | None]]


def encode(inputs: jax.Array, encoding: Encoding) -> jax.Array:
    r"""The first layer's input, ``(H,) -> (H,)`` or ``(2H,)``.

    ============  ===================================================  ==================
    encoding      :math:`E(g)`                                          constant
    ============  ===================================================  ==================
    raw           :math:`g`
    cos_sin       :math:`(cos \tfrac{π g}{2}, sin \tfrac{π g}{2})`  :math:`|E|_2 = \sqrt H`
    complement    :math:`(g, 1 - g)`                                    :math:`|E|_1 = H`
    ============  ===================================================  ==================

    for :math:`g ∈ [0, 1]`. A piecewise linear network without biases scales its outputs with
    the size of its inputs, gradients included; an encoding of constant norm takes that away.
    """
    if encoding == "cos_sin":
        angle = jnp.pi * inputs / 2
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)])
    if encoding == "complement":
        return jnp.concatenate([inputs, 1 - inputs])
    return inputs


@dataclasses.dataclass(frozen=True)
class Hypernetwork:
    r"""An MLP from hyperparameters to weights, for ``self_tuning`` and ``global_response``.

    .. math::
        \hat w_φ(λ) = w_0 + h_φ(E(g(λ)))  \text{(residual)},
        \hat w_φ(λ) = h_φ(E(g(λ)))  \text{(plain)}

    With ``hidden=()`` it is linear, the local best response of Lorraine and Duvenaud; with
    hidden layers a global one. ``encoding="cos_sin"`` and ``residual=True`` together are
    Magnitude Invariant Parametrizations: :math:`w_0`, the base weights, starts as the model
    would, is learnt beside :math:`φ`, and does not depend on the input.

    Args:
      hidden: widths of the hidden layers.
      encoding: of the input, see :func:`encode`; all but ``"raw"`` need inputs in [0, 1].
      residual: whether the base weights are added.
      to_unit: elementwise map of the raw hyperparameters to the input g. ``None``: the logistic
        function where the encoding needs [0, 1] (for an ``Interval`` that is the place
        within its bounds), and the identity for ``"raw"``.
      activation: of hidden layers; positively homogeneous ones (ReLU, leaky ReLU) are what
        the analysis is about.
      init_scale: standard deviation of all first weights; ``None``: He fan-out for hidden
        kernels and :math:`1/\sqrt N` for the heads (N predicted weights), biases 0.
      use_bias: whether hidden layers and, without ``residual``, heads have biases.

    Cost: n times the last width, in memory and multiplications; use ``StructuredResponse``
    beyond about 1e5 weights.

    Reference: Lorraine and Duvenaud, "Stochastic Hyperparameter Optimization through
    Hypernetworks", 2018; Gonzalez Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations
    Improve Hypernetwork Learning", 2024.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel.inner.hypernetwork import Hypernetwork
      >>> network = Hypernetwork((16,), encoding="cos_sin")
      >>> weights = {"w": jnp.ones((3, 2))}
      >>> phi = network.init(jax.random.key(0), weights, jnp.zeros(()))
      >>> network.apply(phi, weights, jnp.array(0.5))["w"].shape
      (3, 2)
    """

    hidden: tuple[int, ...] = (50,)
    encoding: Encoding = "raw"
    residual: bool = True
    to_unit: Callable[[jax.Array], jax.Array] | None = None
    activation: Callable[[jax.Array], jax.Array] = jax.nn.leaky_relu
    init_scale: float | None = None
    use_bias: bool = True
    centred: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, tuple):
            raise TypeError(f"`hidden` must be a tuple of widths, got {self.hidden!r}.")
        for width in self.hidden:
            check_count("hidden", width)
        if self.encoding not in ("raw", "cos_sin", "complement"):
            raise ValueError(
                f"`encoding` must be 'raw', 'cos_sin' or 'complement', got {self.encoding!r}."
            )

    def init(self, key: Key, params: Params, hparams: Hparams) -> HypernetworkParams:
        """First :class:`HypernetworkParams`; ``params`` may be ``ShapeDtypeStruct``."""
        total = size(params)
        width = size(hparams) * (1 if self.encoding == "raw" else 2)
        dtype = accumulator_dtype(jnp.result_type(*[jnp.result_type(x) for x in
                                                    jax.tree.leaves(params)]))  # fmt: skip
        hidden = []
        for i, out in enumerate(self.hidden):
            layer = jax.random.fold_in(key, i)
            hidden.append(self._layer(layer, width, out, float(np.sqrt(2 / out)), dtype))
            width = out
        heads = {}
        for i, (path, leaf) in enumerate(paths(params, "")):
            layer = jax.random.fold_in(key, len(self.hidden) + i)
            out = int(np.prod(jnp.shape(leaf)))
            kernel, bias = self._layer(layer, width, out, float(1 / np.sqrt(total)), dtype)
            heads[path] = (kernel, bias if self.use_bias and not self.residual else None)
        return HypernetworkParams(tuple(hidden), heads)

    def _layer(
        self, key: Key, width: int, out: int, scale: float, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        if self.init_scale is None:
            return scale * jax.random.normal(key, (width, out), dtype), jnp.zeros(out, dtype)
        drawn = self.init_scale * jax.random.normal(key, (width + 1, out), dtype)
        return drawn[:-1], (drawn[-1] if self.use_bias else jnp.zeros(out, dtype))

    def features(self, network_params: HypernetworkParams, hparams: Hparams) -> jax.Array:
        """The last hidden layer, ``(width,)``."""
        x = flatten_hparams(hparams)
        to_unit = self.to_unit
        if to_unit is None:
            to_unit = (lambda x: x) if self.encoding == "raw" else jax.nn.sigmoid
        x = encode(to_unit(x), self.encoding)
        for kernel, bias in network_params.hidden:
            x = x.astype(kernel.dtype) @ kernel
            x = self.activation(x + bias if self.use_bias else x)
        return x

    def apply(self, network_params: HypernetworkParams, params: Params, hparams: Hparams) -> Params:
        """The weights at ``hparams`` (raw), a tree like ``params``."""
        x = self.features(network_params, hparams)
        leaves = []
        for path, leaf in paths(params, ""):
            kernel, bias = network_params.heads[path]
            value = x.astype(kernel.dtype) @ kernel
            value = (value if bias is None else value + bias).reshape(jnp.shape(leaf))
            value = value.astype(leaf.dtype)
            leaves.append(leaf + value if self.residual else value)
        return jax.tree.unflatten(jax.tree.structure(params), leaves)


def clipped_normal(
    mean: float, std: float, low: float, high: float
) -> Callable[[Key, Sequence[int]], jax.Array]:
    """``draw(key, shape)`` of a normal variable clipped to ``[low, high]``, to sample from."""

    def draw(key: Key, shape: Sequence[int]) -> jax.Array:
        return jnp.clip(mean + std * jax.random.normal(key, tuple(shape)), low, high)

    return draw
