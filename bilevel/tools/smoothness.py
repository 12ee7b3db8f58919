r"""Metasmoothness: whether a training run is smooth enough for its gradient to be of use."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Hparams, Key, Params
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_one_real, check_takes
from bilevel.problem.validate import check_same_tree


class Metasmoothness(NamedTuple):
    r"""How two finite differences in a row agree.

    Attributes:
      score: in [-1, 1]: the share of the first difference, in absolute value, whose sign the
        second one shares, minus the rest. Near 1: smooth; near 0: noise.
      first, second: norms of the two differences, divided by the step.
    """

    score: jax.Array
    first: jax.Array
    second: jax.Array


def metasmoothness(
    train: Callable[[Hparams], Params],
    hparams: Hparams,
    direction: Hparams | None = None,
    *,
    step: float = 0.3,
    key: Key | None = None,
) -> Metasmoothness:
    r"""Whether the outcome of training moves smoothly with the hyperparameters.

    .. math:: Δ(z) = \frac{f(z + hv) - f(z)}{h},
        S = \frac{∑_j |Δ_j(z)| signΔ_j(z)
        signΔ_j(z + hv)}{∑_j |Δ_j(z)|}

    A gradient describes what a step of size h does only where the outcome is smooth on that
    scale. Settings of training with a higher score (larger batches, smoother activations, norms,
    smaller rates) give metagradients that optimize better.

    Args:
      train: ``train(hparams) -> params``, or any pytree of outcomes (losses, logits).
      hparams: where.
      direction: v, of their tree; random signs if left out, from ``key``.
      step: h, on the scale of the moves that are to be made.

    Cost: three runs of training.

    Reference: Engstrom et al., "Optimizing ML training with metagradient descent", 2025.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> smooth = bilevel.metasmoothness(jnp.exp, jnp.zeros(3), jnp.ones(3))
      >>> rough = bilevel.metasmoothness(lambda z: jnp.sin(10 * z), jnp.zeros(3), jnp.ones(3))
      >>> float(smooth.score), float(rough.score)
      (1.0, -1.0)
    """
    check_takes("train", train, "train(hparams)")
    check_one_real("step", step)
    hparams = jax.tree.map(jnp.asarray, hparams)
    if direction is None:
        signs = require_key(key, "metasmoothness")
        direction = tree.random_like(
            signs, hparams, lambda key, shape, dtype: jax.random.rademacher(key, shape, dtype)
        )
    check_same_tree(direction, hparams, "direction")
    run = jax.jit(lambda train, hparams: train(hparams))
    train = jax.tree_util.Partial(train)  # what it carries is an argument, not a constant
    outcomes = [run(train, tree.axpy(i * step, direction, hparams)) for i in range(3)]
    first, second = (tree.sub(b, a) for a, b in zip(outcomes, outcomes[1:], strict=False))
    agree = jax.tree.map(lambda a, b: jnp.abs(a) * jnp.sign(a) * jnp.sign(b), first, second)
    total = sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(first))
    share = sum(jnp.sum(x) for x in jax.tree.leaves(agree))
    return Metasmoothness(
        jnp.asarray(share / total), tree.norm(first) / step, tree.norm(second) / step
    )
