r"""One cycle of self-tuning: training steps of weights and response, then validation steps."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, Loss, ModelState, Params, Scalar
from bilevel.checks import check_inner, check_problem
from bilevel.hypergradient.best_response import (
    check_responds,
    mean_over_groups,
    perturbed_loss,
    scale_like,
)
from bilevel.inner.groups import batch_size, draw_noise, fold_keys
from bilevel.leaves import select
from bilevel.linear.base import loop, status_of
from bilevel.operators import GaussNewton, slice_batch, wants_straight_line
from bilevel.outer.base import own, same_type
from bilevel.outer.constrain import Space
from bilevel.outer.tuning_state import (
    SelfTuningInfo,
    SelfTuningState,
    entropy_of,
    inverse_softplus,
    weights_at,
)
from bilevel.problem import Problem
from bilevel.status import Status, code

_KEEP = "Losses and optimizers must return every array in the shape and dtype they received it in."


class _Moved(NamedTuple):
    """What the validation steps move."""

    raw: Hparams
    outer_opt_state: Any
    raw_scales: Hparams
    scale_opt_state: Any


class _Trained(NamedTuple):
    """What the training steps move."""

    params: Params
    model_state: ModelState
    inner_opt_state: Any
    response: Any
    response_opt_state: Any


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The settings of :func:`~bilevel.self_tuning`, checked, and the cycle they make."""

    outer: Loss
    inner: Loss
    inner_tx: optax.GradientTransformation
    outer_tx: optax.GradientTransformation
    inner_steps: int
    outer_steps: int
    network: Any  # a Network; one for layers also has `plain` and `change`
    response_tx: optax.GradientTransformation
    scale_tx: optax.GradientTransformation
    scale: Any
    tune_scales: bool
    entropy: float
    groups: int
    shared: tuple[str, ...]
    linearize: GaussNewton | None
    constrain: Space | None
    warm_up: int
    has_state: bool
    seed: int

    @property
    def per_example(self) -> bool:
        """Whether the network perturbs every example, inside its layers."""
        return getattr(self.network, "per_example", False)

    def real(self, raw: Hparams) -> Hparams:
        """T: what the losses read."""
        if self.constrain is None:
            return raw
        return self.constrain.round(self.constrain.constrain(raw))

    def undisplaced(self, params: Params, response: Any) -> Params:
        """What the losses read as weights where a centred network is not displaced."""
        return self.network.plain(response, params) if self.per_example else params

    def deployed(self, params: Params, response: Any, raw: Hparams) -> Params:
        """The weights at the current hyperparameters."""
        if self.network.centred:
            return self.undisplaced(params, response)
        return weights_at(self.network, response, params, raw)

    def problem(self, model_state: ModelState) -> Problem:
        """The two losses, which read ``model_state`` frozen."""
        return Problem(self.outer, self.inner, has_state=self.has_state, model_state=model_state)

    def init(
        self,
        params: Params,
        hparams: Hparams,
        model_state: ModelState = None,
        *,
        key: Key | None = None,
    ) -> SelfTuningState:
        """The first state; see :func:`~bilevel.self_tuning`."""
        if self.has_state and model_state is None:
            raise ValueError(
                "`has_state=True` needs the first statistics: pass `init(params, hparams, "
                "model_state)`."
            )
        params, hparams = own(params), own(hparams)
        self._shared_flags(hparams)
        raw = hparams if self.constrain is None else self.constrain.unconstrain(hparams)
        key = jax.random.key(self.seed) if key is None else key
        response = self.network.init(key, params, raw)
        raw_scales = jax.tree.map(inverse_softplus, scale_like(self.scale, raw))
        state = SelfTuningState(
            params,
            model_state,
            self.inner_tx.init(params),
            response,
            self.response_tx.init(response),
            self.real(raw),
            raw,
            self.outer_tx.init(raw),
            raw_scales,
            self.scale_tx.init(raw_scales) if self.tune_scales else None,
            jnp.zeros((), jnp.int32),
        )
        return own(state)  # no two leaves may share a buffer that is donated

    def step(
        self,
        state: SelfTuningState,
        *,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key | None = None,
    ) -> tuple[SelfTuningState, SelfTuningInfo]:
        """One cycle; see :func:`~bilevel.self_tuning`."""
        if key is None:
            raise ValueError("`key` is missing: a cycle draws perturbations.")
        straight = self._check_step(state, inner_batches, outer_batch)
        trained, inner_value, response_value = self.train(state, inner_batches, key, straight)
        moved, value, norm = self.tune(state, trained, outer_batch, key, straight)
        new = SelfTuningState(
            *trained,
            same_type(self.real(moved.raw), state.hparams, "hparams", _KEEP),
            *moved,
            state.step + 1,
        )
        scales = jax.tree.map(jax.nn.softplus, state.raw_scales)
        result = status_of(
            code(Status.ok),
            (~jnp.isfinite(inner_value + response_value), Status.nonfinite_input),
            (~jnp.isfinite(value + norm), Status.nonfinite_output),
        )
        info = SelfTuningInfo(
            value,
            inner_value,
            response_value,
            norm,
            self._response_norm(trained, state.raw, scales),
            state.hparams,
            scales,
            result,
        )
        return new, info

    def _expected(
        self,
        loss: Callable[[Hparams, Hparams, Batch], Scalar],
        raw: Hparams,
        scales: Hparams,
        noise: Hparams,
        batch: Batch,
        straight: bool,
    ) -> Scalar:
        """Mean over draws of ``loss(displacement, T(perturbed), part of the batch)``."""
        centre = jax.lax.stop_gradient(raw)

        def perturb(eps: Hparams) -> tuple[Hparams, Hparams]:
            lam = jax.tree.map(lambda x, s, e: x + (s * e).astype(x.dtype), raw, scales, eps)
            return (tree.sub(lam, centre) if self.network.centred else lam), self.real(lam)

        perturbed = jax.vmap(perturb)(noise)
        if self.per_example:
            return loss(perturbed[0], perturbed[1], batch)
        return mean_over_groups(
            lambda pair, part: loss(pair[0], pair[1], part),
            perturbed,
            batch,
            self.groups,
            straight,
        )

    def _noise(self, key: Key, raw: Hparams, batch: Batch) -> Hparams:
        count = batch_size(batch) if self.per_example else self.groups
        return draw_noise(key, raw, count, self._shared_flags(raw))

    def _shared_flags(self, hparams: Hparams) -> Any:
        named = {path for path, _ in select(hparams, self.shared)} if self.shared else set()
        flags = [path in named for path, _ in tree.paths(hparams, "")]
        return jax.tree.unflatten(jax.tree.structure(hparams), flags)

    def train(
        self, state: SelfTuningState, inner_batches: Batch, key: Key, straight: bool = False
    ) -> tuple[_Trained, Scalar, Scalar]:
        """``inner_steps`` training steps, and the two losses of the last."""
        scales = jax.tree.map(jax.nn.softplus, state.raw_scales)

        def general(params: Params, response: Any, batch: Batch, model_state: ModelState) -> Any:
            return self.problem(None).inner_loss_and_state(
                self.undisplaced(params, response), state.hparams, batch, model_state
            )

        def perturbed(
            response: Any, params: Params, model_state: ModelState, noise: Hparams, batch: Batch
        ) -> Scalar:
            problem = self.problem(model_state)
            return self._expected(
                lambda d, h, part: perturbed_loss(
                    problem, self.network, response, params, d, h, part, self.linearize
                ),
                state.raw,
                scales,
                noise,
                batch,
                straight,
            )

        def one(k: Any, carry: tuple[_Trained, Scalar, Scalar]) -> tuple[_Trained, Scalar, Scalar]:
            params, model_state, opt_state, response, response_opt_state = carry[0]
            batch = slice_batch(inner_batches, k)
            noise = self._noise(jax.random.fold_in(key, k), state.raw, batch)
            other = fold_keys(batch, 1)
            if self.network.centred:
                (value, model_state), grads = jax.value_and_grad(general, has_aux=True)(
                    params, response, batch, model_state
                )
                updates, opt_state = self.inner_tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
                # The response learns around the weights as they are after their own step.
                loss, response_grads = jax.value_and_grad(perturbed)(
                    response, params, model_state, noise, other
                )
            else:
                loss, (response_grads, grads) = jax.value_and_grad(perturbed, argnums=(0, 1))(
                    response, params, model_state, noise, other
                )
                value = loss
                updates, opt_state = self.inner_tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            updates, response_opt_state = self.response_tx.update(
                response_grads, response_opt_state, response
            )
            response = optax.apply_updates(response, updates)
            new = _Trained(params, model_state, opt_state, response, response_opt_state)
            losses = (value.astype(carry[1].dtype), loss.astype(carry[2].dtype))
            return same_type(new, carry[0], "training state", _KEEP), *losses

        start = _Trained(*state[: len(_Trained._fields)])
        shape = jax.eval_shape(
            self.problem(state.model_state).inner_loss,
            self.undisplaced(state.params, state.response),
            state.hparams,
            slice_batch(inner_batches, 0),
        )
        zero = jnp.zeros((), tree.accumulator_dtype(shape.dtype))
        return loop(self.inner_steps, one, (start, zero, zero), straight)

    def _objective(
        self,
        raw: Hparams,
        raw_scales: Hparams,
        trained: _Trained | SelfTuningState,
        noise: Hparams,
        batch: Batch,
        straight: bool,
    ) -> tuple[Scalar, Scalar]:
        """The outer objective, and its part without the entropy."""
        problem = self.problem(trained.model_state)

        def loss(d: Hparams, h: Hparams, part: Batch) -> Scalar:
            weights = self.network.apply(trained.response, trained.params, d)
            return problem.outer_loss(weights, h, part)[0]

        if self.tune_scales:
            scales = jax.tree.map(jax.nn.softplus, raw_scales)
            value = self._expected(loss, raw, scales, noise, batch, straight)
            return value - self.entropy * entropy_of(scales).astype(value.dtype), value
        centre = jax.lax.stop_gradient(raw)
        d, h = (tree.sub(raw, centre) if self.network.centred else raw), self.real(raw)
        if self.per_example:
            count = batch_size(batch)
            d, h = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), (d, h))
        value = loss(d, h, batch)
        return value, value

    def tune(
        self,
        state: SelfTuningState,
        trained: _Trained | SelfTuningState,
        outer_batch: Batch,
        key: Key,
        straight: bool = False,
    ) -> tuple[_Moved, Scalar, Scalar]:
        """``outer_steps`` validation steps (none in the warm-up), last loss and gradient norm."""

        def one(j: int, moved: _Moved) -> tuple[_Moved, Scalar, Scalar]:
            batch = slice_batch(outer_batch, j) if self.outer_steps > 1 else outer_batch
            noise = self._noise(jax.random.fold_in(key, self.inner_steps + j), moved.raw, batch)
            (_, value), (grads, scale_grads) = jax.value_and_grad(
                self._objective, argnums=(0, 1), has_aux=True
            )(moved.raw, moved.raw_scales, trained, noise, batch, straight)
            updates, outer_opt_state = self.outer_tx.update(grads, moved.outer_opt_state, moved.raw)
            raw = optax.apply_updates(moved.raw, updates)
            raw_scales, scale_opt_state = moved.raw_scales, moved.scale_opt_state
            if self.tune_scales:
                updates, scale_opt_state = self.scale_tx.update(
                    scale_grads, scale_opt_state, raw_scales
                )
                raw_scales = optax.apply_updates(raw_scales, updates)
            moved = _Moved(raw, outer_opt_state, raw_scales, scale_opt_state)
            return moved, value, tree.norm(grads)

        def tune(moved: _Moved) -> tuple[_Moved, Scalar, Scalar]:
            start = moved
            for j in range(self.outer_steps):
                moved, value, norm = one(j, moved)
            return same_type(moved, start, "outer state", _KEEP), value, norm

        start = _Moved(state.raw, state.outer_opt_state, state.raw_scales, state.scale_opt_state)
        if not self.warm_up:
            return tune(start)

        def wait(moved: _Moved) -> tuple[_Moved, Scalar, Scalar]:
            batch = slice_batch(outer_batch, 0) if self.outer_steps > 1 else outer_batch
            weights = self.deployed(trained.params, trained.response, moved.raw)
            value = self.problem(trained.model_state).outer_loss(weights, state.hparams, batch)[0]
            shapes = jax.eval_shape(tune, moved)
            return moved, value.astype(shapes[1].dtype), jnp.zeros((), shapes[2].dtype)

        return jax.lax.cond(state.step < self.warm_up, wait, tune, start)

    def _response_norm(self, trained: _Trained, raw: Hparams, scales: Hparams) -> Scalar:
        """Length of the weights' move for one scale, over their own."""
        scales = jax.tree.map(lambda s, x: s.astype(x.dtype), scales, raw)
        if self.per_example:
            change = self.network.change(trained.response, trained.params, scales)
        else:
            origin = jax.tree.map(jnp.zeros_like, raw) if self.network.centred else raw
            at = tree.add(origin, scales)
            change = tree.sub(
                self.network.apply(trained.response, trained.params, at),
                self.network.apply(trained.response, trained.params, origin),
            )
        return tree.norm(change) / tree.norm(trained.params)

    def _check_step(self, state: SelfTuningState, inner_batches: Batch, outer_batch: Batch) -> bool:
        """Raise what is wrong when traced; whether the program wants straight-line code."""
        _check_axis(inner_batches, "inner_batches", self.inner_steps, "inner_steps")
        first, first_outer = slice_batch(inner_batches, 0), outer_batch
        if self.outer_steps > 1:
            _check_axis(outer_batch, "outer_batch", self.outer_steps, "outer_steps")
            first_outer = slice_batch(outer_batch, 0)
        problem = self.problem(state.model_state)
        weights = self.undisplaced(state.params, state.response)
        args = (problem, weights, state.hparams)
        check_problem(*args, first, first_outer)
        check_inner(*args, first)
        check_responds(*args, first, first_outer)
        return wants_straight_line(*args, first)


def _check_axis(batches: Batch, name: str, count: int, setting: str) -> None:
    for path, leaf in tree.paths(batches, name):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != count:
            raise ValueError(
                f"{path} has shape {jnp.shape(leaf)}, expected a leading axis of {count}: one "
                f"batch for each of the {setting}={count} steps."
            )
