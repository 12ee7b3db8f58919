r"""Dropout with traced rates, one for all or one an example.

The rates of the common layer libraries are Python numbers: they branch on ``rate == 0`` and
so cannot be traced. These can, and a rate may have the leading axis of the examples.

No derivative reaches a rate: a mask is a step function of it, and the derivative of the
rescaling alone would be a biased part of the truth. It is therefore cut, and a rate can be tuned
by a best response (which samples it) or by ``Evolution``, not by ``Implicit``, which says so.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bilevel.aliases import Key
from bilevel.regularizers.strength import along_examples, check_rate


def dropout_mask(
    key: Key,
    shape: Sequence[int],
    rate: jax.Array | float,
    *,
    broadcast_axes: Sequence[int] = (),
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    r"""The factors of inverted dropout: :math:`m = \mathrm{Bernoulli}(1 - r) / (1 - r)`.

    Args:
      key: a PRNG key.
      shape: shape of the array to be multiplied, ``(B, ...)`` when ``rate`` is per example.
      rate: probability of a zero in [0, 1): a scalar or ``(B,)``, traced or not.
      broadcast_axes: axes that share one draw (their length in the mask is 1): the pixels of
        a channel, the steps of a sequence.
      dtype: of the mask.

    Returns:
      ``shape`` with ones at ``broadcast_axes``; mean one for every rate. Multiply by the same
      mask to drop two arrays together.

    Raises:
      ValueError: a known rate outside [0, 1), or of a shape that does not lead ``shape``.

    Cost: one uniform draw an element of the mask.

    Reference: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way
    to Prevent Neural Networks from Overfitting", 2014.
    """
    check_rate("rate", rate)
    shape = tuple(shape)
    shared = {axis % len(shape) for axis in broadcast_axes} if shape else set()
    shape = tuple(1 if i in shared else s for i, s in enumerate(shape))
    rates = jax.lax.stop_gradient(along_examples("rate", rate, jax.ShapeDtypeStruct(shape, dtype)))
    keep = 1 - rates
    kept = jax.random.uniform(key, shape, jnp.float32) < keep
    return jnp.where(kept, 1 / keep, 0).astype(dtype)


def dropout(
    key: Key, x: jax.Array, rate: jax.Array | float, *, broadcast_axes: Sequence[int] = ()
) -> jax.Array:
    r"""Inverted dropout, :math:`x \odot m` with :math:`m` of :func:`dropout_mask`.

    For images ``(B, H, W, C)``, ``broadcast_axes=(1, 2)`` drops whole channels.

    Args, errors and cost as :func:`dropout_mask`; the result has the shape and dtype of ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel.regularizers import dropout
      >>> x = jnp.ones((2, 1000))
      >>> y = jax.jit(dropout)(jax.random.key(0), x, jnp.array([0.0, 0.5]))
      >>> bool(jnp.all(y[0] == 1)), sorted({float(v) for v in y[1]})
      (True, [0.0, 2.0])
    """
    return x * dropout_mask(key, x.shape, rate, broadcast_axes=broadcast_axes, dtype=x.dtype)


def locked_dropout(
    key: Key, x: jax.Array, rate: jax.Array | float, *, time_axis: int = 1
) -> jax.Array:
    """Variational dropout: one mask a sequence, the same at every step.

    Args:
      key: a PRNG key.
      x: ``(B, T, d)``, or any shape with ``time_axis``.
      rate: in [0, 1): a scalar or ``(B,)``, one a sequence.
      time_axis: the axis whose entries share their mask.

    Reference: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent
    Neural Networks", 2016.
    """
    return dropout(key, x, rate, broadcast_axes=(time_axis,))


def word_mask(key: Key, num_words: int, tokens: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Factors that drop whole words of a vocabulary: shape of ``tokens`` plus a last axis of 1.

    A word is dropped everywhere it occurs (in a sequence, if ``rate`` is ``(B,)``; in the
    whole batch, if a scalar). Cost: one draw a word (and sequence) and one lookup; the table
    itself is never copied.
    """
    rate = jnp.asarray(rate) if not isinstance(rate, float) else rate
    per_example = jnp.ndim(rate) == 1
    if jnp.ndim(rate) > 1 or (per_example and jnp.shape(rate)[0] != tokens.shape[0]):
        raise ValueError(
            f"`rate` has shape {jnp.shape(rate)}, expected a scalar or one rate a sequence of "
            f"`tokens`, whose shape is {tokens.shape}."
        )
    if not per_example:
        return dropout_mask(key, (num_words,), rate)[tokens][..., None]
    mask = dropout_mask(key, (tokens.shape[0], num_words), rate)
    flat = jnp.take_along_axis(mask, tokens.reshape(tokens.shape[0], -1), axis=1)
    return flat.reshape(*tokens.shape, 1)


def embedding_dropout(
    key: Key, table: jax.Array, tokens: jax.Array, rate: jax.Array | float
) -> jax.Array:
    """The embeddings of ``tokens``, with whole words of the vocabulary dropped.

    Args:
      key: a PRNG key.
      table: ``(V, d)`` embeddings.
      tokens: integers in [0, V), any shape ``(B, ...)``.
      rate: in [0, 1): a scalar, or ``(B,)`` for one draw of the vocabulary a sequence.

    Returns:
      ``tokens.shape + (d,)``.

    Reference: Gal and Ghahramani, 2016 (see :func:`locked_dropout`).
    """
    return table[tokens] * word_mask(key, table.shape[0], tokens, rate).astype(table.dtype)


def weight_drop(key: Key, kernel: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Dropout on a weight matrix: one mask for the batch and all steps of a recurrence.

    Args:
      key: a PRNG key.
      kernel: weights of any shape.
      rate: a scalar in [0, 1). A rate an example would need a kernel an example.

    Reference: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using
    DropConnect", 2013; Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2018.
    """
    if jnp.ndim(rate) != 0:
        raise ValueError(
            f"`rate` of `weight_drop` must be a scalar, got shape {jnp.shape(rate)}: the examples "
            "of a batch share the kernel. Perturb it per batch or per group."
        )
    return dropout(key, kernel, rate)
