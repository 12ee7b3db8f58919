r"""A prior on many hyperparameters: each group around a mean of its own.

.. math::
    min_{λ, m} F(λ) + \frac τ2 ∑_g ∑_{j ∈ g} (λ_j - m_g)^2

One hyperparameter for all is :math:`τ = ∞`, independent ones :math:`τ = 0`. With

.. math:: λ_j = m_g + \frac{δ_j}{\sqrt{1 + τ}},
    \frac τ2 (λ_j - m_g)^2 = \frac12 \frac{τ}{1 + τ} δ_j^2

both are ordinary points of one family: at infinity the deviations no longer reach
:math:`λ`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Hparams, Loss, Scalar
from bilevel.ground.batches import is_single_key
from bilevel.ground.leaves import select
from bilevel.ground.settings import check_number, check_one_real, concrete
from bilevel.ground.tree import accumulate, paths
from bilevel.problem.conditions import Composite, Condition, FixedPoint, Root
from bilevel.problem.validate import check_inexact, check_inner_problem, check_losses


class Deviations(NamedTuple):
    """Hyperparameters as a mean of each group and what each of them adds: what a loop moves.

    Attributes:
      mean: :math:`m`, a dictionary from the path of a leaf (``"all"`` for one group of all).
      deviation: :math:`\\delta`, likewise, shaped like the leaves.
      others: the leaves that the prior does not hold for, by their paths.
    """

    mean: dict[str, jax.Array]
    deviation: dict[str, jax.Array]
    others: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class HyperPrior:
    r"""Gaussian or heavy-tailed prior on hyperparameters around the mean of their group.

    For logarithms of strengths, rates and noises, of which there are many. It is added to the
    outer loss, whatever that is: held-out, cross-validated, SURE, evidence.

    Args:
      like: hyperparameters of the shapes to come, any tree.
      strength: :math:`τ ≥ 0`, in units of the outer loss; ``float("inf")`` shares one number
        per group exactly. May be traced (``vmap`` over strengths). Beside a mean negative
        log-likelihood of n examples, :math:`1 / (n s^2)` lets logarithms deviate by s: 0.5 to 2.
      groups: ``"all"``: one mean; ``"tensor"``: one per leaf; ``"unit"``: one per entry of the
        last axis of each leaf; or a tree like ``like`` of whole numbers from 0 on, the group of
        each hyperparameter, across leaves.
      degrees: degrees of freedom :math:`ν` of a Student-t in place of the Gaussian,
        :math:`\frac{ν+1}2 ∑_j log(1 + τ d_j^2 / ν)`: a few may lie far out.
      leaves: parts of the names of the leaves that it holds for; all if ``None``.

    Use: the loop moves ``init(hparams)`` and reads ``outer(loss)``, ``inner(loss)`` in place of
    the losses; ``hparams(moved)`` are the hyperparameters::

        prior = HyperPrior(hparams, strength=1e-3)
        alg = bilevel.alternate(prior.outer(valid), prior.inner(train), ...)
        state = alg.init(params, prior.init(hparams))

    Which strength is right depends on the data, for none is for all: :func:`choose_strength` takes
    it from examples that neither loss reads, with exact sharing among the candidates.

    Raises:
      TypeError, ValueError: for settings and trees that do not fit.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> hparams = {"decay": jnp.array([0.0, 2.0])}
      >>> prior = bilevel.objectives.HyperPrior(hparams, strength=3.0)
      >>> moved = prior.init(hparams)
      >>> print(prior.hparams(moved)["decay"], prior.penalty(moved))
      [0. 2.] 3.0
      >>> shared = bilevel.objectives.HyperPrior(hparams, strength=float("inf"))
      >>> print(shared.hparams(shared.init(hparams))["decay"])
      [1. 1.]

    Cost: elementwise, and one number per group more.

    Reference: Gelman and Hill, "Data analysis using regression and multilevel models", 2007;
    Papaspiliopoulos, Roberts, Skold, "A general framework for the parametrization of hierarchical
    models", Statistical Science 2007.
    """

    like: Hparams
    strength: Any
    groups: Any = "tensor"
    degrees: float | None = None
    leaves: str | Sequence[str] | None = None
    labels: dict[str, np.ndarray] | None = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        if self.degrees is not None:
            check_one_real("degrees", self.degrees, 0, strict=True)
        check_inexact(self.like, "like", "Write `1.0` for `1`.")
        chosen = select(self.like, self.leaves)
        if not chosen:
            raise ValueError("`like` has no leaves: pass hyperparameters.")
        named = isinstance(self.groups, str)
        if named and self.groups not in ("all", "tensor", "unit"):
            raise ValueError(
                "`groups` must be 'all', 'tensor', 'unit', or a tree of whole numbers like "
                f"`like`, got {self.groups!r}."
            )
        object.__setattr__(self, "labels", None if named else _labels(self.groups, chosen))

    def at(self, strength: Any) -> "HyperPrior":
        """The same prior with another strength."""
        return HyperPrior(self.like, strength, self.groups, self.degrees, self.leaves)

    def init(self, hparams: Hparams) -> Deviations:
        """The mean of each group, and the deviations that give ``hparams`` back.

        With an infinite strength there are none, and ``hparams(init(hparams))`` is the mean.
        """
        inside, others = self._split(hparams)
        means = self._means(inside)
        spread = self._spread(jnp.result_type(*inside.values()))
        safe = jnp.where(spread > 0, spread, 1)
        wide = self._wide(means, inside)
        deviation = {
            path: jnp.where(spread > 0, (x - wide[path]) / safe, 0) for path, x in inside.items()
        }
        return Deviations(means, deviation, others)

    def hparams(self, moved: Deviations) -> Hparams:
        r""":math:`λ = m + δ / \sqrt{1 + τ}`, as the losses read them."""
        spread = self._spread(jnp.result_type(*moved.deviation.values()))
        wide = self._wide(moved.mean, moved.deviation)
        inside = {path: wide[path] + spread * x for path, x in moved.deviation.items()}
        found = {**inside, **moved.others}
        leaves = [
            jnp.asarray(found[path], jnp.result_type(like)) for path, like in paths(self.like, "")
        ]
        return jax.tree.unflatten(jax.tree.structure(self.like), leaves)

    def penalty(self, moved: Deviations) -> Scalar:
        """What is added to the outer loss."""
        dtype = jnp.result_type(*moved.deviation.values())
        # tau / (1 + tau), which is 1 at infinity.
        weight = 1 - self._spread(dtype) ** 2
        squares = [weight * x**2 for x in moved.deviation.values()]
        if self.degrees is None:
            return 0.5 * jnp.sum(jnp.stack([jnp.sum(s) for s in squares]))
        nu = jnp.asarray(self.degrees, dtype)
        logs = jnp.stack([jnp.sum(jnp.log1p(s / nu)) for s in squares])
        return 0.5 * (nu + 1) * jnp.sum(logs)

    def outer(self, loss: Loss) -> Loss:
        """``loss`` of the moved variable, plus the penalty; auxiliary outputs pass through."""
        check_losses(outer=loss)

        def outer(params: Any, moved: Deviations, batch: Any, *state: Any) -> Any:
            out = loss(params, self.hparams(moved), batch, *state)
            if isinstance(out, tuple):
                return out[0] + self.penalty(moved).astype(out[0].dtype), *out[1:]
            return out + self.penalty(moved).astype(out.dtype)

        return outer

    def inner(self, inner: Loss | Condition) -> Any:
        """``inner``, a loss or a condition, of the moved variable."""
        check_inner_problem(inner)

        def reading(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(params: Any, moved: Deviations, *rest: Any) -> Any:
                return function(params, self.hparams(moved), *rest)

            return call

        if isinstance(inner, Composite):
            return Composite(reading(inner.loss), reading(inner.prox), inner.step_size)
        if isinstance(inner, FixedPoint):
            return FixedPoint(reading(inner.step))
        if isinstance(inner, Root):
            return Root(reading(inner.equation))
        return reading(inner)

    def _spread(self, dtype: Any) -> jax.Array:
        r""":math:`1 / \sqrt{1 + τ}`, which is 0 at infinity."""
        strength = jnp.asarray(self.strength, dtype)
        # A traced strength below zero gives no number that looks like one.
        return 1 / jnp.sqrt(1 + jnp.where(strength >= 0, strength, jnp.nan))

    def _split(self, hparams: Hparams) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        found, chosen = paths(hparams, ""), {path for path, _ in select(self.like, self.leaves)}
        if [(p, jnp.shape(x)) for p, x in found] != [
            (p, jnp.shape(x)) for p, x in paths(self.like, "")
        ]:
            raise ValueError(
                "`hparams` has other names or shapes than `like`, which the prior was made for."
            )
        inside = {path: accumulate(jnp.asarray(x)) for path, x in found if path in chosen}
        return inside, {path: jnp.asarray(x) for path, x in found if path not in chosen}

    def _means(self, inside: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if self.labels is not None:
            flat = jnp.concatenate([x.ravel() for x in inside.values()])
            labels = np.concatenate([self.labels[path].ravel() for path in inside])
            sums = jnp.zeros(labels.max() + 1, flat.dtype).at[labels].add(flat)
            return {"groups": sums / jnp.asarray(np.bincount(labels), flat.dtype)}
        if self.groups == "all":
            return {"all": jnp.mean(jnp.concatenate([x.ravel() for x in inside.values()]))}
        if self.groups == "tensor":
            return {path: jnp.mean(x) for path, x in inside.items()}
        return {path: jnp.mean(x, axis=tuple(range(x.ndim - 1))) for path, x in inside.items()}

    def _wide(
        self, means: dict[str, jax.Array], like: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The mean of its group at the place of each hyperparameter."""
        if self.labels is not None:
            return {path: means["groups"][self.labels[path]] for path in like}
        named = {path: means["all"] if self.groups == "all" else means[path] for path in like}
        return {path: jnp.broadcast_to(named[path], x.shape) for path, x in like.items()}


def check_strength(name: str, strength: Any) -> None:
    """At least 0; infinity is one."""
    check_number(name, strength)
    if np.ndim(strength):
        raise ValueError(
            f"`{name}` has shape {np.shape(strength)}, expected one number: map over several with "
            "`jax.vmap`."
        )
    if concrete(strength) and not float(strength) >= 0:
        raise ValueError(f"`{name}` must be at least 0 (infinity included), got {strength}.")


def _labels(groups: Any, chosen: list[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """User-given groups, by the path of their leaf."""
    given = dict(paths(groups, ""))
    found = {}
    for path, leaf in chosen:
        label = given.get(path, 0.5)
        is_key = isinstance(label, jax.Array) and is_single_key(label)
        labels = np.asarray(0.5 if is_key else label)
        if labels.shape != jnp.shape(leaf) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"`groups`{path} must be whole numbers of shape {jnp.shape(leaf)}, the group of "
                "each hyperparameter there: pass a tree like `like`."
            )
        found[path] = labels
    flat = np.concatenate([labels.ravel() for labels in found.values()])
    if flat.min() < 0 or np.any(np.bincount(flat) == 0):
        raise ValueError("`groups` must count from 0 on without a gap.")
    return found
