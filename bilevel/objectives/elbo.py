r"""A variational objective that weighs the data up: the prior's strength in closed form.

.. math::
    1/N ∑_i E_q ℓ_i(w) + \frac{1}{κ N} \mathrm{KL}(q ‖ p),
    q = \mathcal N(m, s^2 I),  p = \mathcal N(μ_0, t I)

With :math:`κ = 1` it is the evidence lower bound. With many more parameters than examples its
KL term drowns the data and the best prior is one that fits nothing; :math:`κ = D/N` restores
the balance.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Loss, Params, Scalar
from bilevel.ground.keys import require_key
from bilevel.ground.leaves import select
from bilevel.ground.settings import check_count, check_one_real
from bilevel.problem.validate import check_losses, check_same_tree, check_scalar


class Variational(NamedTuple):
    """A Gaussian over parameters, :math:`q = N(m, s^2 I)`.

    Attributes:
      mean: m, shaped like the parameters of the model; what to predict with.
      raw_scale: :math:`\\rho`, with :math:`s = \\log(1 + e^\\rho)`.
    """

    mean: Params
    raw_scale: Scalar

    @property
    def scale(self) -> Scalar:
        """s."""
        return jax.nn.softplus(self.raw_scale)


@dataclasses.dataclass(frozen=True, eq=False)
class DataEmphasizedELBO:
    r"""The negative data-emphasized evidence lower bound per example.

    .. math:: t^* = s^2 + \frac{‖m - μ_0‖^2}{d},
        \mathrm{KL}(t^*) = d/2 log \frac{t^*}{s^2}

    The variance of the prior needs no search: the best one is inserted, in closed form, for each
    group of parameters. One training run takes the place of a grid over weight decays.

    Args:
      loss: ``loss(params, hparams, batch) -> scalar``: the mean negative log-likelihood of a
        batch, in nats.
      num_examples: N, of all data.
      kappa: above 0; ``None`` takes D / N, with D the number of parameters, so that the KL term
        is weighed by 1 / D in place of 1 / N. 1 is the plain bound.
      separate: parts of the names of leaves, such as ``"head"``: those of each part get a prior
        variance of their own, the others share one.
      center: :math:`μ_0`, a tree like the parameters (those of pre-training); zero if ``None``.
      prior_variance: t, above 0, in place of the closed form: one number, or one per part of
        ``separate`` and then one for the others.
      samples: of the parameters, in each evaluation.

    A value with ``outer`` and ``inner``, which are one function of ``(Variational, hparams, (data,
    key))``: other hyperparameters (noise, augmentation) can be learned with the parameters or by
    any outer loop. ``init(params, scale)`` makes the :class:`Variational`;
    ``prior_variances(variational)`` are the :math:`t^*` in use.

    Raises:
      TypeError, ValueError: for settings and trees that do not fit.

    Cost: one loss per sample. Its value bounds the evidence only for :math:`κ = 1`.

    Example:
      >>> import jax, jax.numpy as jnp, bilevel
      >>> def loss(w, hparams, batch):
      ...     return 0.5 * jnp.mean((w - batch) ** 2)
      >>> elbo = bilevel.objectives.DataEmphasizedELBO(loss, num_examples=10)
      >>> q = elbo.init(jnp.ones(100), scale=0.1)
      >>> value = elbo.outer(q, (), (jnp.ones(100), jax.random.key(0)))
      >>> print(elbo.prior_variances(q))
      [1.01]

    Reference: Harvey, Petrov, Hughes, "Learning hyperparameters via a data-emphasized variational
    objective", 2025.
    """

    loss: Loss
    num_examples: int
    kappa: Any = None
    separate: str | Sequence[str] = ()
    center: Params | None = None
    prior_variance: Any = None
    samples: int = 1

    def __post_init__(self) -> None:
        check_losses(loss=self.loss)
        check_count("num_examples", self.num_examples)
        check_count("samples", self.samples)
        if self.kappa is not None:
            check_one_real("kappa", self.kappa, 0, strict=True)
        names = (self.separate,) if isinstance(self.separate, str) else tuple(self.separate)
        object.__setattr__(self, "separate", names)
        if self.prior_variance is None:
            return
        many = isinstance(self.prior_variance, (tuple, list))
        given = tuple(self.prior_variance) if many else (self.prior_variance,)
        for variance in given:
            check_one_real("prior_variance", variance, 0, strict=True)
        if len(given) not in (1, len(names) + 1):
            raise ValueError(
                f"`prior_variance` has {len(given)} entries, expected one, or {len(names) + 1}: "
                "one for each part of `separate` and one for the other parameters."
            )

    def init(self, params: Params, scale: float = 1e-4) -> Variational:
        """A narrow Gaussian around ``params``.

        Raises:
          ValueError: for a ``scale`` that is not above 0.
        """
        check_one_real("scale", scale, 0, strict=True)
        dtype = jnp.result_type(*jax.tree.leaves(tree.accumulate(params)))
        # log(e^s - 1), which loses nothing for small s; for large s it is s.
        raw = scale + np.log(-np.expm1(-float(scale)))
        return Variational(jax.tree.map(jnp.asarray, params), jnp.asarray(raw, dtype))

    def inner_batch(self, data: Batch) -> Batch:
        """``data``: all of it is trained on. Pair it with a key, ``(data, key)``."""
        return data

    outer_batch = inner_batch

    def outer(self, params: Variational, hparams: Hparams, batch: Batch) -> Scalar:
        """The objective; ``batch`` is a pair ``(data, key)``."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError("this objective draws samples: its batch must be a pair (data, key).")
        data, key = batch
        self._check(params)
        keys = jax.random.split(require_key(key, "`DataEmphasizedELBO`"), self.samples)
        noise = jax.vmap(lambda k: tree.random_like(k, params.mean, jax.random.normal))(keys)
        return self.at(params, hparams, data, noise)

    inner = outer

    def at(self, params: Variational, hparams: Hparams, data: Batch, noise: Params) -> Scalar:
        """The objective at the samples :math:`m + s \\varepsilon` of given noise.

        ``noise`` is a tree like the parameters with a leading axis of samples.
        """
        self._check(params)

        def one(noise: Params) -> Scalar:
            moved = tree.axpy(params.scale, noise, params.mean)
            value = self.loss(tree.cast_like(moved, params.mean), hparams, data)
            check_scalar(value, "loss")
            return value

        kappa = tree.size(params.mean) / self.num_examples if self.kappa is None else self.kappa
        kappa = jnp.where(jnp.asarray(kappa) > 0, kappa, jnp.nan)  # a traced one may be anything
        return jnp.mean(jax.vmap(one)(noise)) + self.kl(params) / (kappa * self.num_examples)

    def kl(self, params: Variational) -> Scalar:
        r""":math:`\mathrm{KL}(q ‖ p)`, summed over the groups."""
        self._check(params)
        sizes, distances = self._groups(params)
        variance, s2 = self.prior_variances(params), params.scale**2
        ratio = (s2 + distances / sizes) / variance
        return 0.5 * jnp.sum(sizes * (ratio - 1 + jnp.log(variance / s2)))

    def prior_variances(self, params: Variational) -> jax.Array:
        """t of each group: those of ``separate``, then that of the other parameters."""
        self._check(params)
        sizes, distances = self._groups(params)
        if self.prior_variance is None:
            return params.scale**2 + distances / sizes
        many = isinstance(self.prior_variance, (tuple, list))
        given = self.prior_variance if many else [self.prior_variance] * sizes.size
        return jnp.asarray(given, distances.dtype)

    def _groups(self, params: Variational) -> tuple[Any, jax.Array]:
        r"""Sizes d and :math:`‖m - μ_0‖^2` of the groups."""
        mean = params.mean
        moved = mean if self.center is None else tree.sub(mean, self.center)
        moved = dict(tree.paths(tree.accumulate(moved), ""))
        parts: list[list[str]] = []
        left = dict(moved)
        for name in self.separate:
            chosen = [path for path, _ in select(mean, name, "separate") if path in left]
            if not chosen:
                raise ValueError(
                    f"`separate`: the leaves of {name!r} all belong to a part named before it."
                )
            parts.append(chosen)
            left = {path: leaf for path, leaf in left.items() if path not in chosen}
        if left:
            parts.append(list(left))
        elif self.prior_variance is not None:
            raise ValueError(
                "`separate` names all leaves, so that `prior_variance` has one number for none: "
                "leave one part out of `separate`."
            )
        sizes = jnp.asarray(
            [float(sum(moved[path].size for path in part)) for part in parts],
            params.raw_scale.dtype,
        )
        distances = [sum(jnp.sum(moved[path] ** 2) for path in part) for part in parts]
        return sizes, jnp.stack([jnp.asarray(d) for d in distances])

    def _check(self, params: Any) -> None:
        if not isinstance(params, Variational):
            raise TypeError(
                f"`params` must be a `Variational`, got {type(params).__name__}: start from "
                "`init(params)` of this objective."
            )
        if self.center is not None:
            check_same_tree(self.center, params.mean, "center")
