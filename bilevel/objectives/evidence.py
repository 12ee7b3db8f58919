r"""The Laplace evidence: hyperparameters from the training data alone.

.. math::
    -log p(y ∣ λ) ≈ ∑_i ℓ_i(w^*) + ½ ‖w^*‖^2_{P_0}
        + ½ log|I + M|,  M = Q^{1/2} J P_0^{-1} Jᵀ Q^{1/2}

The log-determinant is that of a kernel matrix of the examples. Cutting it into blocks can only
raise it (Fischer), so every partition bounds the evidence from below, and one block at a time gives
a stochastic estimate of that bound.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Params, Scalar
from bilevel.ground.batches import check_batch
from bilevel.ground.keys import require_key
from bilevel.ground.settings import check_count, check_flag, check_takes, concrete, is_function
from bilevel.ground.tree import accumulate, paths
from bilevel.objectives.kernel import (
    is_psd,
    likelihood_of,
    log_volume,
    num_in,
    outputs_of,
    per_example,
    psd_root,
)
from bilevel.regularizers.penalties import l2_penalty

Outputs = Literal["full", "independent", "single"]


def _refuse_indefinite(values: jax.Array) -> None:
    if not bool(jnp.all(is_psd(values))):
        raise ValueError(
            "`likelihood` is not convex in the outputs: its Hessian has an eigenvalue "
            f"{float(jnp.min(values)):.3g} on this batch, and the evidence has no Gaussian to "
            "be approximated by. Use one that is (squared error, cross-entropy, Poisson with a "
            "log link); a variance that the model predicts is not, jointly with the mean."
        )


def named_precision(hparams: Hparams) -> Any:
    """``hparams["log_precision"]``."""
    return hparams["log_precision"]


@dataclasses.dataclass(frozen=True)
class LaplaceEvidence:
    r"""The negative log evidence per example, by Laplace's approximation, or a bound above it.

    The prior is :math:`w_j ∼ \mathcal N(0, e^{-λ_j})`, with one log precision for all, per
    tensor, per unit or per weight; the likelihood and the model may read hyperparameters too
    (observation noise, augmentation). No validation data: all data are trained on.

    Args:
      model: ``model(params, hparams, batch) -> outputs``, (examples,) or (examples, outputs).
        Examples may not see each other (no batch norm on the batch).
      likelihood: ``likelihood(outputs, hparams, batch) -> (examples,)``: negative log-likelihoods
        in nats, with their constants that depend on hyperparameters. Convex in the outputs.
      num_examples: N, of all data; batches may hold fewer.
      log_precision: ``log_precision(hparams)`` gives :math:`λ`: a number, or a dictionary as
        of :func:`~bilevel.regularizers.penalty_init` that names every leaf. By default
        ``hparams["log_precision"]``.
      outputs: ``"full"`` keeps all outputs of an example together, ``"independent"`` cuts between
        outputs, ``"single"`` takes one at random: an unbiased estimate of ``"independent"`` for
        one row of the Jacobian per example. Its outer batch is a pair ``(data, key)``.
      block: cut the batch into consecutive blocks of so many examples. ``None``: one block.
      groups: ``groups(batch) -> (examples,)`` of whole numbers, such as the labels; cuts between
        examples of different groups. Within a class the kernel is largest, so that this loses less
        than random blocks of the same size.
      frozen_curvature: leave out how M depends on the parameters. At a minimum of ``inner`` the
        outer loss then has no gradient in them, and the hypergradient is ``direct`` alone, as in
        the reference.

    A value with ``outer``, ``inner`` (the negative log posterior per example, up to a constant),
    ``init``, ``inner_batch``, ``outer_batch``; ``check(params, hparams, batch)`` refuses outside
    ``jit`` a likelihood whose Hessian is not positive semi-definite, which ``outer`` answers with
    NaN where it cannot see numbers.

    Bounds are ordered: every cut (``outputs``, ``block``, ``groups``, a smaller batch) raises the
    value on average or always. A batch of b examples weighs N / b: unbiased for the bound of the
    random partition it comes from.

    Raises:
      TypeError, ValueError: for settings, shapes, and parameters without a prior precision.

    Cost: b C gradients of one example for b examples and C outputs (C times less for
    ``"single"``), memory for as many, and :math:`(b C)^3` arithmetic (less by cuts), or
    :math:`b C D^2` where the D parameters are fewer.

    Example:
      >>> import jax.numpy as jnp, bilevel
      >>> def model(w, hparams, batch):
      ...     return batch[0] @ w
      >>> def gaussian(f, hparams, batch):  # with known noise 1
      ...     return 0.5 * (f - batch[1]) ** 2 + 0.5 * jnp.log(2 * jnp.pi)
      >>> evidence = bilevel.objectives.LaplaceEvidence(model, gaussian, num_examples=2)
      >>> hparams = {"log_precision": jnp.array(0.0)}
      >>> data = jnp.eye(2), jnp.array([1.0, -1.0])  # y ~ N(0, 2 I)
      >>> value = evidence.outer(jnp.array([0.5, -0.5]), hparams, data)
      >>> bool(jnp.allclose(value, 0.25 + 0.5 * jnp.log(4 * jnp.pi)))
      True

    Reference: MacKay, "A practical Bayesian framework for backpropagation networks", Neural
    Computation 1992; Immer et al., "Stochastic marginal likelihood gradients using neural tangent
    kernels", ICML 2023.
    """

    model: Callable[..., Any]
    likelihood: Callable[..., Any]
    num_examples: int
    log_precision: Callable[[Hparams], Any] = named_precision
    outputs: Outputs = "full"
    block: int | None = None
    groups: Callable[[Batch], jax.Array] | None = None
    frozen_curvature: bool = False

    def __post_init__(self) -> None:
        for name, call in (
            ("model", "model(params, hparams, batch)"),
            ("likelihood", "likelihood(outputs, hparams, batch)"),
            ("log_precision", "log_precision(hparams)"),
            ("groups", "groups(batch)"),
        ):
            given = getattr(self, name)
            if name == "groups" and given is None:
                continue
            if not is_function(given):
                raise TypeError(f"`{name}` must be a function {call}, got {given!r}.")
            check_takes(name, given, call)
        check_count("num_examples", self.num_examples)
        if self.outputs not in ("full", "independent", "single"):
            raise ValueError(
                f"`outputs` must be 'full', 'independent' or 'single', got {self.outputs!r}."
            )
        if self.block is not None:
            check_count("block", self.block)
        check_flag("frozen_curvature", self.frozen_curvature)

    def init(self, params: Params) -> Params:
        """``params``: there is one fit."""
        return params

    def inner_batch(self, data: Batch) -> Batch:
        """``data``: all of it is trained on."""
        return data

    outer_batch = inner_batch

    def inner(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        r""":math:`1/b ∑_i ℓ_i + \frac1{2N}‖w‖^2_{P_0}`: negative log posterior / N."""
        likelihoods = self._likelihoods(params, hparams, batch)
        return jnp.mean(likelihoods) + self._prior(params, hparams) / self.num_examples

    def outer(self, params: Params, hparams: Hparams, batch: Batch) -> Scalar:
        """The negative log evidence per example, estimated from a batch."""
        key = None
        if self.outputs == "single":
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(
                    "`outputs='single'` draws an output: its outer batch must be a pair "
                    "(data, key)."
                )
            batch, key = batch[0], require_key(batch[1], "`outputs='single'`")
        check_batch(batch, "batch")
        if all(concrete(x) for x in jax.tree.leaves((params, hparams, batch))):
            values = jnp.linalg.eigvalsh(self._hessians(params, hparams, batch))
            if concrete(values):  # under `jit` they are not, though all inputs are constants
                _refuse_indefinite(values)
        volume = self._volume(params, hparams, batch, key) / num_in(batch)
        return self.inner(params, hparams, batch) + 0.5 * volume

    def check(self, params: Params, hparams: Hparams, batch: Batch) -> None:
        """Refuse a likelihood whose Hessian in the outputs is indefinite at these values.

        Raises:
          ValueError: with the smallest eigenvalue, and for values that are traced.
        """
        values = jnp.linalg.eigvalsh(self._hessians(params, hparams, batch))
        if not concrete(values):
            raise ValueError("`check` needs concrete values: call it outside of `jit` and `grad`.")
        _refuse_indefinite(values)

    def _likelihoods(self, params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
        out = self.model(params, hparams, batch)
        values = self.likelihood(out, hparams, batch)
        if getattr(values, "shape", None) != (num_in(batch),):
            raise ValueError(
                "`likelihood` must return one negative log-likelihood per example, of shape "
                f"({num_in(batch)},), got {getattr(values, 'shape', jax.tree.structure(values))}: "
                "leave the sum or the mean over examples out."
            )
        return values

    def _precisions(self, params: Params, hparams: Hparams) -> dict[str, jax.Array]:
        """The log precision of each leaf, by its path."""
        given, leaves = self.log_precision(hparams), paths(params, "")
        if given is None:
            raise TypeError(
                "`log_precision` returned None: return the log precisions, one number or a "
                "dictionary that names each leaf."
            )
        if not isinstance(given, Mapping):
            return {path: jnp.asarray(given) for path, _ in leaves}
        missing = [path or "(the only leaf)" for path, _ in leaves if path not in given]
        if missing:
            raise ValueError(
                f"`log_precision` names no precision for {', '.join(missing)}: the evidence needs "
                "a prior on every parameter. Name each leaf, as `penalty_init(params, 1.0)` does."
            )
        return {path: jnp.asarray(given[path]) for path, _ in leaves}

    def _prior(self, params: Params, hparams: Hparams) -> Scalar:
        self._precisions(params, hparams)
        return l2_penalty(params, self.log_precision(hparams))

    def _hessians(self, params: Params, hparams: Hparams, batch: Batch) -> jax.Array:
        """The Hessian of each example's loss in its outputs, (examples, outputs, outputs)."""

        def one(example: Batch, _: jax.Array) -> jax.Array:
            return self._hessian(params, hparams, example)[1]

        return per_example(one, batch)

    def _hessian(self, params: Params, hparams: Hparams, example: Batch) -> tuple[bool, jax.Array]:
        outputs = outputs_of(self.model, params, hparams, example)
        flat = len(jax.eval_shape(self.model, params, hparams, example).shape) == 1
        loss = lambda z: likelihood_of(self.likelihood, z, flat, hparams, example)  # noqa: E731
        return flat, jax.hessian(loss)(outputs)

    def _volume(self, params: Params, hparams: Hparams, batch: Batch, key: Any) -> Scalar:
        r""":math:`log|I + M|` of a batch, of the blocks that are kept."""
        precisions = self._precisions(params, hparams)
        if self.frozen_curvature:
            params = jax.lax.stop_gradient(params)
        scales = [jnp.exp(-0.5 * accumulate(precisions[path])) for path, _ in paths(params, "")]

        def rows(example: Batch, _: jax.Array) -> Any:
            root = psd_root(self._hessian(params, hparams, example)[1])
            _, pull = jax.vjp(lambda w: outputs_of(self.model, w, hparams, example), params)
            if key is not None:
                chosen = jax.random.randint(key, (), 0, root.shape[0])
                root = jax.lax.dynamic_slice_in_dim(root, chosen, 1)
            return jax.vmap(lambda r: pull(r)[0])(root)

        leaves = jax.tree.leaves(per_example(rows, batch))  # (examples, outputs, *leaf)
        count = self._outputs(params, hparams, batch)
        ids = None if self.groups is None else self.groups(batch)
        if not isinstance(ids, (jax.Array, np.ndarray)) and self.groups is not None:
            raise TypeError(
                f"`groups` returned {type(ids).__name__}, expected an array of whole numbers, one "
                "per example."
            )
        if self.outputs == "full":
            return self._blocks(leaves, scales, ids)
        parts = jax.vmap(lambda g: self._blocks([x[:, None] for x in g], scales, ids), in_axes=1)(
            leaves
        )
        return jnp.sum(parts) if key is None else count * jnp.sum(parts)

    def _outputs(self, params: Params, hparams: Hparams, batch: Batch) -> int:
        shape = jax.eval_shape(self.model, params, hparams, batch).shape
        return 1 if len(shape) == 1 else shape[1]

    def _blocks(self, rows: list[jax.Array], scales: list[jax.Array], ids: Any) -> Scalar:
        """The sum over blocks of examples; ``rows`` are (examples, outputs, *leaf)."""
        b, c = rows[0].shape[:2]
        size = b if self.block is None else min(self.block, b)
        if b % size:
            raise ValueError(
                f"`block`={size} does not divide the batch of {b} examples: pass a divisor of it."
            )
        if ids is not None and ids.shape != (b,):
            raise ValueError(
                f"`groups` returned shape {ids.shape}, expected one number per example, ({b},)."
            )

        def one(rows: list[jax.Array], ids: Any) -> Scalar:
            flat = [g.reshape(-1, *g.shape[2:]) for g in rows]
            return log_volume(flat, scales, None if ids is None else jnp.repeat(ids, c))

        cut = [g.reshape(b // size, size, *g.shape[1:]) for g in rows]
        ids = None if ids is None else ids.reshape(b // size, size)
        return jnp.sum(jax.vmap(one)(cut, ids))
