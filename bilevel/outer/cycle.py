r"""One cycle of self-tuning: training steps of weights and response, then validation steps."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel import tree
from bilevel.aliases import Batch, Hparams, Key, ModelState, Params, Scalar
from bilevel.checks import check_inner, check_key, check_point, check_problem, check_split
from bilevel.hypergradient.best_response import check_responds, scale_like
from bilevel.inner.groups import fold_keys
from bilevel.linear.base import loop, status_of
from bilevel.operators import wants_straight_line
from bilevel.outer.base import check_model_state, check_state, own, same_type
from bilevel.outer.training import batch_at, check_stack, no_line_search, update
from bilevel.outer.tuning import Moved, Trained, Tuning
from bilevel.outer.tuning_state import SelfTuningInfo, SelfTuningState, inverse_softplus
from bilevel.status import Status, code

_KEEP = "Losses and optimizers must return every array in the shape and dtype they received it in."


def deploy(tuning: Tuning, state: SelfTuningState, hparams: Hparams | None = None) -> Params:
    """What the losses read as weights at ``hparams``; see :class:`~bilevel.Algorithm`.

    An uncentred network reads unconstrained hyperparameters, and whole numbers before they
    were rounded. Those of now and those of the last reported value are known exactly.
    """
    raw = state.raw if hparams is None else tuning.raw_of(state, hparams)
    return tuning.for_params(state.params).weights(state.params, state.response, raw)


def init(
    tuning: Tuning,
    params: Params,
    hparams: Hparams,
    model_state: ModelState = None,
    *,
    key: Key | None = None,
) -> SelfTuningState:
    """The first state; see :func:`~bilevel.self_tuning`."""
    check_model_state(tuning.has_state, model_state)
    check_point(params, hparams)
    params, hparams = own(params), own(hparams)
    tuning = tuning.for_params(params)
    tuning.shared_flags(hparams)
    raw = hparams if tuning.constrain is None else tuning.constrain.unconstrain(hparams)
    check_key(key)
    key = jax.random.key(tuning.seed) if key is None else key
    response = tuning.network.init(key, params, raw)
    raw_scales = jax.tree.map(inverse_softplus, scale_like(tuning.scale, raw))
    state = SelfTuningState(
        params,
        model_state,
        tuning.inner_tx.init(params),
        response,
        _response_opt_state(tuning, response),
        tuning.real(raw),
        raw,
        tuning.outer_tx.init(raw),
        raw_scales,
        tuning.scale_tx.init(raw_scales) if tuning.tune_scales else None,
        raw,
        jnp.zeros((), jnp.int32),
    )
    return own(state)  # no two leaves may share a buffer that is donated


def _response_opt_state(tuning: Tuning, response: Any) -> Any:
    if tuning.response_tx is not tuning.inner_tx:
        return tuning.response_tx.init(response)
    try:
        return tuning.response_tx.init(response)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`inner_tx` does not fit the parameters of the response network (it tells leaves "
            "of `params` apart): pass an optimizer for them as `response_tx`."
        ) from error


def step(
    tuning: Tuning,
    state: SelfTuningState,
    *,
    inner_batches: Batch,
    outer_batch: Batch,
    key: Key | None = None,
) -> tuple[SelfTuningState, SelfTuningInfo]:
    """One cycle; see :func:`~bilevel.self_tuning`."""
    if key is None:
        raise ValueError(
            "`key` is missing: a cycle draws perturbations. Pass `key=jax.random.key(...)`."
        )
    check_key(key)
    check_state(state, SelfTuningState)
    tuning = tuning.for_params(state.params)
    straight = _check_step(tuning, state, inner_batches, outer_batch)
    trained, inner_value, response_value = train(tuning, state, inner_batches, key, straight)
    moved, value, norm = tune(tuning, state, trained, outer_batch, key, straight)
    new = SelfTuningState(
        *trained,
        same_type(tuning.real(moved.raw), state.hparams, "hparams", _KEEP),
        *moved,
        state.raw,
        state.step + 1,
    )
    response_norm = tuning.response_norm(trained, state.raw, state.raw_scales)
    scales = jax.tree.map(jax.nn.softplus, state.raw_scales)
    result = status_of(
        code(Status.ok),
        # A network that never trained says that nothing responds.
        (response_norm == 0, Status.invalid_setting),
        (~jnp.isfinite(inner_value + response_value), Status.nonfinite_input),
        (~jnp.isfinite(value + norm), Status.nonfinite_output),
    )
    info = SelfTuningInfo(
        value,
        inner_value,
        response_value,
        norm,
        response_norm,
        state.hparams,
        scales,
        result,
    )
    return new, info


def train(
    tuning: Tuning, state: SelfTuningState, inner_batches: Batch, key: Key, straight: bool = False
) -> tuple[Trained, Scalar, Scalar]:
    """``inner_steps`` training steps, and the two losses of the last."""
    scales = jax.tree.map(jax.nn.softplus, state.raw_scales)

    def perturbed(
        response: Any, params: Params, model_state: ModelState, noise: Hparams, batch: Batch
    ) -> Scalar:
        return tuning.perturbed(
            response, params, model_state, state.raw, scales, noise, batch, straight
        )

    def one(k: Any, carry: tuple[Trained, Scalar, Scalar]) -> tuple[Trained, Scalar, Scalar]:
        params, model_state, opt_state, response, response_opt_state = carry[0]
        batch = batch_at(inner_batches, k)
        noise = tuning.noise(jax.random.fold_in(key, k), state.raw, batch)
        other = fold_keys(batch, 1)
        if tuning.network.centred:
            (value, new_model_state), grads = jax.value_and_grad(tuning.general, has_aux=True)(
                params, response, state.hparams, batch, model_state
            )

            def at(w: Params) -> Scalar:
                return tuning.general(w, response, state.hparams, batch, model_state)[0]

            new_params, opt_state = update(
                tuning.inner_tx, grads, opt_state, params, value=value, value_fn=at
            )
            # The response learns around the weights as they are after their own step.
            around, model_state = new_params, new_model_state
            loss, response_grads = jax.value_and_grad(perturbed)(
                response, around, model_state, noise, other
            )
        else:
            around = params
            loss, (response_grads, grads) = jax.value_and_grad(perturbed, argnums=(0, 1))(
                response, params, model_state, noise, other
            )
            value = loss
            new_params, opt_state = update(
                tuning.inner_tx, grads, opt_state, params, value=value,
                value_fn=lambda w: perturbed(response, w, model_state, noise, other),
            )  # fmt: skip
        new_response, response_opt_state = update(
            tuning.response_tx, response_grads, response_opt_state, response, value=loss,
            value_fn=lambda r: perturbed(r, around, model_state, noise, other),
        )  # fmt: skip
        new = Trained(new_params, model_state, opt_state, new_response, response_opt_state)
        losses = (value.astype(carry[1].dtype), loss.astype(carry[2].dtype))
        return same_type(new, carry[0], "training state", _KEEP), *losses

    start = Trained(*state[: len(Trained._fields)])
    shape = jax.eval_shape(
        tuning.problem(state.model_state).inner_loss,
        tuning.undisplaced(state.params, state.response),
        state.hparams,
        batch_at(inner_batches, 0),
    )
    zero = jnp.zeros((), tree.accumulator_dtype(shape.dtype))
    return loop(tuning.inner_steps, one, (start, zero, zero), straight)


def tune(
    tuning: Tuning,
    state: SelfTuningState,
    trained: Trained | SelfTuningState,
    outer_batch: Batch,
    key: Key,
    straight: bool = False,
) -> tuple[Moved, Scalar, Scalar]:
    """``outer_steps`` validation steps (none in the warm-up), first loss and gradient norm.

    The first, because it is taken at the hyperparameters that the cycle reports.
    """

    def one(j: int, moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        batch = batch_at(outer_batch, j) if tuning.outer_steps > 1 else outer_batch
        noise = tuning.noise(jax.random.fold_in(key, tuning.inner_steps + j), moved.raw, batch)
        (total, value), (grads, scale_grads) = jax.value_and_grad(
            tuning.objective, argnums=(0, 1), has_aux=True
        )(moved.raw, moved.raw_scales, trained, noise, batch, straight)
        raw, outer_opt_state = update(
            tuning.outer_tx, grads, moved.outer_opt_state, moved.raw, value=total,
            value_fn=no_line_search("outer_tx"),
        )  # fmt: skip
        raw_scales, scale_opt_state = moved.raw_scales, moved.scale_opt_state
        if tuning.tune_scales:
            raw_scales, scale_opt_state = update(
                tuning.scale_tx, scale_grads, scale_opt_state, raw_scales, value=total,
                value_fn=no_line_search("scale_tx"),
            )  # fmt: skip
        moved = Moved(raw, outer_opt_state, raw_scales, scale_opt_state)
        return moved, value, tree.norm(grads)

    def tune(moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        start = moved
        moved, value, norm = one(0, moved)
        for j in range(1, tuning.outer_steps):
            moved, _, _ = one(j, moved)
        return same_type(moved, start, "outer state", _KEEP), value, norm

    start = Moved(state.raw, state.outer_opt_state, state.raw_scales, state.scale_opt_state)
    if not tuning.warm_up:
        return tune(start)

    def wait(moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        batch = batch_at(outer_batch, 0) if tuning.outer_steps > 1 else outer_batch
        weights = tuning.weights(trained.params, trained.response, moved.raw)
        value = tuning.problem(trained.model_state).outer_loss(weights, state.hparams, batch)[0]
        shapes = jax.eval_shape(tune, moved)
        return moved, value.astype(shapes[1].dtype), jnp.zeros((), shapes[2].dtype)

    return jax.lax.cond(state.step < tuning.warm_up, wait, tune, start)


def _check_step(
    tuning: Tuning, state: SelfTuningState, inner_batches: Batch, outer_batch: Batch
) -> bool:
    """Raise what is wrong when traced; whether the program wants straight-line code."""
    reads = "one batch for each of the {}={} steps"
    check_stack(
        inner_batches,
        tuning.inner_steps,
        "inner_batches",
        reads.format("inner_steps", tuning.inner_steps),
    )
    first, first_outer = batch_at(inner_batches, 0), outer_batch
    if tuning.outer_steps > 1:
        check_stack(
            outer_batch,
            tuning.outer_steps,
            "outer_batch",
            reads.format("outer_steps", tuning.outer_steps),
        )
        first_outer = batch_at(outer_batch, 0)
    problem = tuning.problem(state.model_state)
    weights = tuning.undisplaced(state.params, state.response)
    args = (problem, weights, state.hparams)
    check_problem(*args, first, first_outer)
    check_inner(*args, first)
    check_responds(*args, first, first_outer)
    if tuning.linearize is not None:
        check_split(tuning.linearize, *args, first)
    return wants_straight_line(*args, first)
