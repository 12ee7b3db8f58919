r"""Best-response layers for flax.nnx: one displacement per *example*, inside the layer.

A layer with kernel W, its response R and gains U maps example :math:`i` by

.. math:: y_i = W x_i + b + (d_i U) ⊙ (R x_i) + d_i U_b

which is the weight-space response of :class:`~bilevel.StructuredResponse` with a displacement
of its own for every example, for a second matrix product. Input-side products of a
recurrence and all gates :math:`d U` are made once a batch, outside the loop over time.

Every layer is called with ``d`` of shape ``(B, H)``, or with ``None`` for the plain layer, which
costs nothing extra. B is the leading axis of the input.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Key, Params
from bilevel.inner.network import fan_in_uniform, flatten_hparams
from bilevel.inner.recurrence import lstm, lstm_step


class ResponseParam(nnx.Variable):
    """A parameter of a response: R is named ``*_response``, U ``*_gains``."""


def gate(d: jax.Array, gains: Any, like: jax.Array) -> jax.Array:
    """:math:`d U` as ``(B, 1, ..., out)``, to scale an array with the axes of ``like``.

    A single row of ``d`` is every example's, and the result then has a leading axis of one.
    """
    gains = gains[...]
    if d.ndim != 2 or d.shape[1] != gains.shape[0] or d.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"`d` has shape {d.shape}, expected ({like.shape[0]}, {gains.shape[0]}): one row an "
            "example of the input (or one row for all), one column per hyperparameter."
        )
    scale = (d.astype(gains.dtype) @ gains).astype(like.dtype)
    return scale.reshape(scale.shape[0], *(1,) * (like.ndim - 2), scale.shape[1])


def _response(rngs: nnx.Rngs, shape: Sequence[int], num_hparams: int, dtype: Any) -> Any:
    """R (fan-in uniform) and U (zero: no response at first) of one kernel."""
    weights = fan_in_uniform(rngs.params(), shape, dtype)
    return ResponseParam(weights), ResponseParam(jnp.zeros((num_hparams, shape[-1]), dtype))


def _along_last(bias: Any, like: jax.Array) -> jax.Array:
    value = bias[...].astype(like.dtype)
    return value.reshape((1,) * (like.ndim - 1) + value.shape)


class TunedLinear(nnx.Module):
    """Dense layer ``(B, ..., in) -> (B, ..., out)``; kernel and bias start fan-in uniform.

    Args:
      in_features, out_features: widths.
      num_hparams: H.
      rngs: ``nnx.Rngs``.
      dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_hparams: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype))
        self.kernel_response, self.kernel_gains = _response(rngs, shape, num_hparams, dtype)
        self.bias_gains = ResponseParam(jnp.zeros((num_hparams, out_features), dtype))

    def __call__(self, x: jax.Array, d: jax.Array | None = None) -> jax.Array:
        """The layer at displacement ``d``: two products, or one without."""
        y = x @ self.kernel[...].astype(x.dtype)
        y = y + _along_last(self.bias, y)
        if d is None:
            return y
        moved = x @ self.kernel_response[...].astype(x.dtype)
        return y + gate(d, self.kernel_gains, moved) * moved + gate(d, self.bias_gains, y)


class TunedConv(nnx.Module):
    """Convolution ``(B, H, W, in) -> (B, H', W', out)`` in any number of dimensions.

    Args:
      in_features, out_features: channels.
      kernel_size: window, one length a dimension.
      num_hparams: H.
      strides: one per dimension, or one for all.
      padding: ``"SAME"``, ``"VALID"`` or pairs.
      rngs: ``nnx.Rngs``.
      dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        num_hparams: int,
        *,
        strides: int | Sequence[int] = 1,
        padding: Any = "SAME",
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        shape = (*kernel_size, in_features, out_features)
        self.strides = (strides,) * len(kernel_size) if isinstance(strides, int) else tuple(strides)
        self.padding = padding
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype))
        self.kernel_response, self.kernel_gains = _response(rngs, shape, num_hparams, dtype)
        self.bias_gains = ResponseParam(jnp.zeros((num_hparams, out_features), dtype))

    def _convolve(self, x: jax.Array, kernel: Any) -> jax.Array:
        kernel = kernel[...].astype(x.dtype)
        window = "".join(chr(ord("0") + i) for i in range(kernel.ndim - 2))
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=(f"N{window}C", f"{window}IO", f"N{window}C"),
        )

    def __call__(self, x: jax.Array, d: jax.Array | None = None) -> jax.Array:
        """The layer at displacement ``d``: two convolutions, or one without."""
        y = self._convolve(x, self.kernel)
        y = y + _along_last(self.bias, y)
        if d is None:
            return y
        moved = self._convolve(x, self.kernel_response)
        return y + gate(d, self.kernel_gains, moved) * moved + gate(d, self.bias_gains, y)


class TunedEmbedding(nnx.Module):
    """Embedding ``(B, ...) -> (B, ..., features)``; table and response start U(-0.1, 0.1).

    Args:
      num_embeddings, features: shape of the table.
      num_hparams: H.
      rngs: ``nnx.Rngs``.
      dtype: of the parameters.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        num_hparams: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        def draw() -> jax.Array:
            shape = (num_embeddings, features)
            return jax.random.uniform(rngs.params(), shape, dtype, -0.1, 0.1)

        self.embedding = nnx.Param(draw())
        self.embedding_response = ResponseParam(draw())
        self.embedding_gains = ResponseParam(jnp.zeros((num_hparams, features), dtype))

    def __call__(self, tokens: jax.Array, d: jax.Array | None = None) -> jax.Array:
        """Two lookups, or one without ``d``. Drop words by multiplying with ``word_mask``."""
        out = self.embedding[...][tokens]
        if d is None:
            return out
        moved = self.embedding_response[...][tokens]
        return out + gate(d, self.embedding_gains, moved) * moved

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits by the table itself, ``(B, ..., V)``: a tied decoder does not respond."""
        return x @ self.embedding[...].astype(x.dtype).T


class TunedLSTMCell(nnx.Module):
    r"""LSTM with kernels ``(in, 4n)`` and ``(n, 4n)`` and one bias; gates in the order i, f, g, o.

    Its step is :func:`~bilevel.inner.recurrence.lstm_step`.

    Args:
      in_features, features: widths of the input and of the state, n.
      num_hparams: H.
      rngs: ``nnx.Rngs``.
      dtype: of the parameters.

    Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        num_hparams: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        self.inputs = TunedLinear(in_features, 4 * features, num_hparams, rngs=rngs, dtype=dtype)
        shape = (features, 4 * features)
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), shape, dtype))
        self.kernel_response, self.kernel_gains = _response(rngs, shape, num_hparams, dtype)
        self.features = features

    def start(self, batch: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Zero states ``(c, h)``, each ``(batch, n)``."""
        return jnp.zeros((batch, self.features), dtype), jnp.zeros((batch, self.features), dtype)

    def __call__(
        self, carry: tuple[jax.Array, jax.Array], x: jax.Array, d: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """One step on ``x`` of shape ``(B, in)``: the new ``(c, h)``, and h."""
        carry, outputs = self.sequence(carry, x[:, None], d)
        return carry, outputs[:, 0]

    def sequence(
        self,
        carry: tuple[jax.Array, jax.Array],
        xs: jax.Array,
        d: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """All steps of ``xs``, ``(B, T, in)``: the last ``(c, h)``, and h at each ``(B, T, n)``.

        ``mask`` (such as ``dropout_mask(key, (n, 4n), rate)``, for weight drop) multiplies the
        recurrent kernel and its response alike, once.
        """

        def masked(parameter: Any) -> jax.Array:
            weights = parameter[...].astype(xs.dtype)
            return weights if mask is None else weights * mask.astype(xs.dtype)

        kernel = masked(self.kernel)
        projected = jnp.swapaxes(self.inputs(xs, d), 0, 1)
        if d is None:
            carry, outputs = lstm(carry, projected, kernel)
            return carry, jnp.swapaxes(outputs, 0, 1)
        response = masked(self.kernel_response)
        scale = gate(d, self.kernel_gains, projected[0])

        # Two gradients of kernels run beside the chain of the loop on a second core, and after
        # it, as one product each, a training step took 6 % longer.
        def step(carry: Any, x: jax.Array) -> Any:
            return lstm_step(carry, x + carry[1] @ kernel + scale * (carry[1] @ response))

        carry, outputs = jax.lax.scan(step, carry, projected)
        return carry, jnp.swapaxes(outputs, 0, 1)


class Perturbed(NamedTuple):
    """What a loss receives as ``params`` from a :class:`LayerResponse`.

    Attributes:
      base: the plain model's parameters.
      response: those of the response.
      displacement: ``(B, H)``, ``(1, H)`` for all examples, or ``None`` for the plain model.
    """

    base: Params
    network_params: Any
    displacement: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LayerResponse:
    r"""The network for :func:`~bilevel.self_tuning` on a model built of the layers here.

    Made by :func:`split_layers`. A loss receives :class:`Perturbed` and rebuilds the model:

    .. code-block:: python

        network, params = split_layers(Net(num_hparams, rngs=nnx.Rngs(0)))
        def loss(params, hparams, batch):
            model, d = network.merge(params)
            return cross_entropy(model(batch["x"], hparams, d), batch["y"])

    In the perturbed steps every leaf of ``hparams`` has the leading axis of the examples and
    ``d`` is ``(B, H)``; in the general step they are scalars and ``None``. The regularizers of
    this library take both. Columns of ``d`` are in the order of ``jax.tree.leaves(hparams)``.
    """

    graph: Any
    template: Any
    centred: bool = True
    gain_scale: float = 0.0
    per_example: bool = dataclasses.field(default=True, init=False)

    def init(self, key: Key, params: Params, hparams: Hparams) -> Any:
        """Fresh response parameters: R fan-in uniform, U normal of ``gain_scale``.

        Raises:
          ValueError: the layers were built for another number of hyperparameters.
        """
        count = tree.size(hparams)
        leaves = []
        for i, (path, leaf) in enumerate(tree.paths(self.template, "")):
            leaf_key = jax.random.fold_in(key, i)
            if "_gains" in path:
                if leaf.shape[0] != count:
                    raise ValueError(
                        f"{path} was built for {leaf.shape[0]} hyperparameters, but `hparams` has "
                        f"{count}: pass `num_hparams={count}` to the layers."
                    )
                drawn = self.gain_scale * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)
            elif "embedding" in path:
                drawn = jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -0.1, 0.1)
            else:
                drawn = fan_in_uniform(leaf_key, leaf.shape, leaf.dtype)
            leaves.append(drawn)
        return jax.tree.unflatten(jax.tree.structure(self.template), leaves)

    def apply(self, network_params: Any, params: Params, displacement: Hparams) -> Perturbed:
        """Parameters at one displacement per example (leaves with a leading axis B)."""
        return Perturbed(params, network_params, jax.vmap(flatten_hparams)(displacement))

    def everywhere(self, network_params: Any, params: Params, displacement: Hparams) -> Perturbed:
        """Parameters at one displacement for all examples (leaves without the axis B)."""
        return Perturbed(params, network_params, flatten_hparams(displacement)[None])

    def plain(self, network_params: Any, params: Params) -> Perturbed:
        """Parameters of the plain model; it reads no ``response``, so ``None`` stands for any."""
        if network_params is None:
            network_params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.template)
        return Perturbed(params, network_params, None)

    def merge(self, params: Perturbed) -> tuple[Any, jax.Array | None]:
        """The model with these parameters, and the displacement to call it with."""
        return nnx.merge(self.graph, params.base, params.network_params), params.displacement

    def change(self, network_params: Any, params: Params, displacement: Hparams) -> Any:
        """How the weights move for one displacement (no examples), by path."""
        d = flatten_hparams(displacement)
        leaves = dict(tree.paths(network_params, ""))
        moves = {}
        for path, gains in leaves.items():
            if "_gains" in path:
                scale = d.astype(gains.dtype) @ gains
                weights = leaves.get(path.replace("_gains", "_response"))
                if weights is not None:
                    scale = scale.reshape((1,) * (weights.ndim - 1) + scale.shape) * weights
                moves[path] = scale
        return moves


def split_layers(
    model: nnx.Module, *, centred: bool = True, gain_scale: float = 0.0
) -> tuple[LayerResponse, Params]:
    """The network and the base parameters of a model built of best-response layers.

    Args:
      model: an nnx module whose variables are ``nnx.Param`` and :class:`ResponseParam` only.
      centred, gain_scale: as in :class:`~bilevel.StructuredResponse`.

    Raises:
      ValueError: the model has no best-response layer, or variables of another kind.
    """
    graph, params, network_params, rest = nnx.split(model, nnx.Param, ResponseParam, ...)
    if not jax.tree.leaves(network_params):
        raise ValueError(
            "the model has no best-response layer: build it of `TunedLinear`, `TunedConv`, "
            "`TunedEmbedding` or `TunedLSTMCell`, or use `StructuredResponse`, which needs none."
        )
    if jax.tree.leaves(rest):
        names = ", ".join(path for path, _ in tree.paths(rest, ""))
        raise ValueError(
            f"the model has variables beside its parameters: {names}. Keep keys in the batch and "
            "statistics out of layers that are perturbed an example at a time."
        )
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), network_params)
    return LayerResponse(graph, template, centred, gain_scale), params
