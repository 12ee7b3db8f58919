r"""Dropout with traced rates, one for all or one per example.

The rates of the common layer libraries are Python numbers: they branch on ``rate == 0`` and
so cannot be traced. These can, and a rate may have the leading axis of the examples. A traced
rate outside [0, 1) gives NaN.

No derivative reaches a rate: a mask is a step function of it, and the derivative of the
rescaling alone would be a biased part of the truth. It is therefore cut, and a rate can be tuned
by a best response (which samples it) or by ``Evolution``, not by ``Implicit``, which says so.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Key
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_count, concrete
from bilevel.regularizers.strength import axes, check_integers, floating, rates, widened


def dropout_mask(
    key: Key,
    shape: Sequence[int],
    rate: jax.Array | float,
    *,
    broadcast_axes: Sequence[int] = (),
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    r"""The factors of inverted dropout: :math:`m = Bernoulli(1 - r) / (1 - r)`.

    Args:
      key: a PRNG key.
      shape: shape of the array to be multiplied, ``(B, ...)`` when ``rate`` is per example.
      rate: probability of a zero in [0, 1): a scalar or ``(B,)``, traced or not.
      broadcast_axes: axes that share one draw (their length in the mask is 1): the pixels of
        a channel, the steps of a sequence.
      dtype: of the mask, floating-point.

    Returns:
      ``shape`` with ones at ``broadcast_axes``; mean one for every rate. Multiply by the same
      mask to drop two arrays together. NaN where a traced rate is outside [0, 1).

    Raises:
      TypeError: a dtype that cannot hold :math:`1/(1-r)`, or a `key` that is not a PRNG key.
      ValueError: a known rate outside [0, 1), or of a shape that does not lead ``shape``; an
        axis that ``shape`` does not have.

    Cost: one uniform draw an element of the mask.

    Reference: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way
    to Prevent Neural Networks from Overfitting", 2014.
    """
    require_key(key, "dropout")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`dtype` of a mask must be a real floating-point dtype, got {dtype}: the factors are "
            "0 and 1 / (1 - rate)."
        )
    if not isinstance(shape, Sequence):
        raise TypeError(f"`shape` must be a tuple of whole numbers, got {shape!r}.")
    shape = tuple(shape)
    shared = axes("broadcast_axes", broadcast_axes, len(shape))
    if 0 in shared and np.ndim(rate):
        raise ValueError(
            f"`rate` has shape {np.shape(rate)}, but the leading axis shares one draw, so that "
            "every example has the same rate: pass a scalar."
        )
    shape = tuple(1 if i in shared else s for i, s in enumerate(shape))
    keep = 1 - jax.lax.stop_gradient(rates("rate", rate, jax.ShapeDtypeStruct(shape, dtype)))
    dropped = jax.random.uniform(key, shape, jnp.float32) >= keep  # false where keep is NaN
    return jnp.where(dropped, 0, 1 / keep).astype(dtype)


def dropout(
    key: Key, x: jax.Array, rate: jax.Array | float, *, broadcast_axes: Sequence[int] = ()
) -> jax.Array:
    r"""Inverted dropout, :math:`x ⊙ m` with :math:`m` of :func:`dropout_mask`.

    For images ``(B, H, W, C)``, ``broadcast_axes=(1, 2)`` drops whole channels.

    Args, errors and cost as :func:`dropout_mask`; ``x`` is floating-point, and the result has its
    shape and dtype (the product is made in at least float32).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bilevel.regularizers import dropout
      >>> x = jnp.ones((2, 1000))
      >>> y = jax.jit(dropout)(jax.random.key(0), x, jnp.array([0.0, 0.5]))
      >>> bool(jnp.all(y[0] == 1)), sorted({float(v) for v in y[1]})
      (True, [0.0, 2.0])
    """
    x = floating("x", x)
    wide = widened(x)
    mask = dropout_mask(key, x.shape, rate, broadcast_axes=broadcast_axes, dtype=wide.dtype)
    return (wide * mask).astype(x.dtype)


def locked_dropout(
    key: Key, x: jax.Array, rate: jax.Array | float, *, time_axis: int = 1
) -> jax.Array:
    """Variational dropout: one mask a sequence, the same at every step.

    Args:
      key: a PRNG key.
      x: ``(B, T, d)``, or any shape with ``time_axis``.
      rate: in [0, 1): a scalar or ``(B,)``, one per sequence.
      time_axis: the axis whose entries share their mask, counted as in NumPy. With 0 the leading
        axis holds no examples, and ``rate`` must be a scalar.

    Errors as :func:`dropout_mask`.

    Reference: Gal and Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent
    Neural Networks", 2016.
    """
    x = floating("x", x)
    return dropout(key, x, rate, broadcast_axes=axes("time_axis", (time_axis,), x.ndim))


def word_mask(key: Key, num_words: int, tokens: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Factors that drop whole words of a vocabulary: shape of ``tokens`` plus a last axis of 1.

    A word is dropped everywhere it occurs (in a sequence, if ``rate`` is ``(B,)``; in the
    whole batch, if a scalar). Cost: one draw a word (and sequence) and one lookup; the table
    itself is never copied.

    Tokens are integers in [0, ``num_words``). Known ones outside are refused; the factors of
    traced ones are NaN, as those of a traced rate outside [0, 1).
    """
    check_count("num_words", num_words)
    legal = _legal(tokens, num_words)
    tokens = jnp.where(legal, tokens, 0)
    if np.ndim(rate) and np.shape(rate) != tokens.shape[:1]:
        raise ValueError(
            f"`rate` has shape {np.shape(rate)}, expected a scalar or one rate per sequence of "
            f"`tokens`, whose shape is {tokens.shape}."
        )
    if np.ndim(rate) == 0:
        factors = dropout_mask(key, (num_words,), rate)[tokens]
    else:
        mask = dropout_mask(key, (tokens.shape[0], num_words), rate)
        flat = jnp.take_along_axis(
            mask, tokens.reshape(len(tokens), math.prod(tokens.shape[1:])), axis=1
        )
        factors = flat.reshape(tokens.shape)
    return jnp.where(legal, factors, jnp.nan)[..., None]


def _legal(tokens: jax.Array, num_words: int) -> jax.Array:
    """Which tokens are in the table; known ones that are not are refused."""
    check_integers("tokens", tokens)
    if concrete(tokens):
        known = np.asarray(tokens)
        outside = known[(known < 0) | (known >= num_words)]
        if outside.size:
            raise ValueError(
                f"`tokens` contains {outside[0]}, outside the {num_words} words of the table: "
                f"expected 0 to {num_words - 1}."
            )
    tokens = jnp.asarray(tokens)
    if num_words > jnp.iinfo(tokens.dtype).max:
        return tokens >= 0  # 8 bits cannot even be compared with 300
    return (tokens >= 0) & (tokens < num_words)


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
      ``tokens.shape + (d,)``. Rows of NaN for traced tokens outside the table (negative ones
      too) and traced rates outside [0, 1).

    Raises:
      TypeError: tokens that are not integers, or a table that is not floating-point.
      ValueError: known tokens outside the table, or a known rate outside [0, 1).

    Reference: Gal and Ghahramani, 2016 (see :func:`locked_dropout`).
    """
    table = floating("table", table, 2, "(V, d)")
    if table.ndim != 2:
        raise ValueError(f"`table` must have shape (V, d), got {table.shape}.")
    factors = word_mask(key, table.shape[0], tokens, rate)
    rows = widened(table[jnp.asarray(tokens)])
    return (rows * factors.astype(rows.dtype)).astype(table.dtype)


def weight_drop(key: Key, kernel: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Dropout on a weight matrix: one mask for the batch and all steps of a recurrence.

    Args:
      key: a PRNG key.
      kernel: weights of any shape.
      rate: a scalar in [0, 1). A rate per example would need a kernel per example.

    Errors as :func:`dropout_mask`.

    Reference: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using
    DropConnect", 2013; Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2018.
    """
    if np.ndim(rate) != 0:
        raise ValueError(
            f"`rate` of `weight_drop` must be a scalar, got shape {np.shape(rate)}: the examples "
            "of a batch share the kernel. Perturb it per batch or per group."
        )
    return dropout(key, floating("kernel", kernel), rate)
