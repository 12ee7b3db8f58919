r"""One cycle of self-tuning: training steps of weights and response, then validation steps."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, ModelState, Params, Scalar
from bilevel.ground.batches import check_stack, select_batch
from bilevel.ground.keys import require_key
from bilevel.ground.loops import keep_types, loop, unrolls
from bilevel.ground.status import Status, status_of
from bilevel.hypergradient.best_response import check_responds, scale_like
from bilevel.inner.descend import InnerState, take_step
from bilevel.inner.groups import fold_keys
from bilevel.outer.base import KEEP, Info, check_model_state, check_state, own
from bilevel.outer.self_tuning.losses import Tuning
from bilevel.outer.self_tuning.state import Moved, SelfTuningState, Trained, inverse_softplus
from bilevel.outer.variable import Variable
from bilevel.problem.validate import check_inner, check_point, check_problem, check_split


def deploy(tuning: Tuning, state: SelfTuningState, hparams: Hparams | None = None) -> Params:
    """What the losses read as weights at ``hparams``; see :class:`~bilevel.Algorithm`.

    An uncentred network reads unconstrained hyperparameters, and whole numbers before they
    were rounded. Those of now and those of the last reported value are known exactly.
    """
    raw = state.raw if hparams is None else tuning.raw_of(state, hparams)
    return tuning.for_params(state.params).weights(state.trained, raw)


def init(
    tuning: Tuning,
    params: Params,
    hparams: Hparams,
    model_state: ModelState = None,
    *,
    key: Key | None = None,
) -> SelfTuningState:
    """The first state; see :func:`~bilevel.self_tuning`."""
    check_model_state(tuning.problem.has_state, model_state)
    check_point(params, hparams)
    key = require_key(jax.random.key(tuning.seed) if key is None else key, "`init`")
    params, hparams = own(params), own(hparams)
    tuning = tuning.for_params(params)
    tuning.shared_flags(hparams)
    outer = tuning.mover.begin(hparams)
    network = tuning.network.init(key, params, outer.moving)
    raw_scales = jax.tree.map(inverse_softplus, scale_like(tuning.scale, outer.moving))
    widths = Variable(raw_scales, None, None)
    if tuning.tune_scales:
        widths = tuning.scale_mover.begin(raw_scales)
    trained = Trained(
        InnerState(params, tuning.inner_tx.init(params), model_state),
        InnerState(network, _network_opt_state(tuning, network)),
    )
    state = SelfTuningState(trained, Moved(outer, widths), outer.moving, jnp.zeros((), jnp.int32))
    return own(state)  # no two leaves may share a buffer that is donated


def _network_opt_state(tuning: Tuning, network: Any) -> Any:
    if tuning.response_tx is not tuning.inner_tx:
        return tuning.response_tx.init(network)
    try:
        return tuning.response_tx.init(network)
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
) -> tuple[SelfTuningState, Info]:
    """One cycle; see :func:`~bilevel.self_tuning`."""
    key = require_key(key, "A cycle")
    check_state(state, SelfTuningState)
    tuning = tuning.for_params(state.params)
    unroll = _check_step(tuning, state, inner_batches, outer_batch)
    trained, inner_value, response_value = train(tuning, state, inner_batches, key, unroll)
    moved, value, norm = tune(tuning, state, trained, outer_batch, key, unroll)
    new = SelfTuningState(trained, moved, state.raw, state.step + 1)
    response_norm = tuning.response_norm(trained, state.raw, state.scales)
    result = status_of(
        Status.ok,
        # A network that never trained says that nothing responds.
        (response_norm == 0, Status.invalid_setting),
        (~jnp.isfinite(inner_value + response_value), Status.nonfinite_input),
        (~jnp.isfinite(value + norm), Status.nonfinite_output),
    )
    cost = tuning.cost().arrays()
    waits = state.step < tuning.warm_up
    info = Info(
        value,
        inner_value,
        norm,
        state.hparams,
        result,
        {"response_loss": response_value, "response_norm": response_norm},
        cost._replace(outer_gradients=jnp.where(waits, 0, cost.outer_gradients)),
        {"scales": state.scales},
    )
    return keep_types(new, state, "state", KEEP), info


def train(
    tuning: Tuning, state: SelfTuningState, inner_batches: Batch, key: Key, unroll: bool = False
) -> tuple[Trained, Scalar, Scalar]:
    """``inner_steps`` training steps, and the two losses of the last."""

    def one(k: Any, carry: tuple[Trained, Scalar, Scalar]) -> tuple[Trained, Scalar, Scalar]:
        batch = select_batch(inner_batches, k)
        noise = tuning.noise(jax.random.fold_in(key, k), state.raw, batch)
        step = _apart if tuning.network.centred else _together
        trained, value, loss = step(tuning, carry[0], state, noise, batch, unroll)
        return trained, value.astype(carry[1].dtype), loss.astype(carry[2].dtype)

    shape = jax.eval_shape(
        tuning.problem.at(state.model_state).inner_loss,
        tuning.undisplaced(state.trained),
        state.hparams,
        select_batch(inner_batches, 0),
    )
    zero = jnp.zeros((), tree.accumulator_dtype(shape.dtype))
    return loop(tuning.inner_steps, one, (state.trained, zero, zero), unroll)


def _apart(
    tuning: Tuning,
    trained: Trained,
    state: SelfTuningState,
    noise: Hparams,
    batch: Batch,
    unroll: bool,
) -> tuple[Trained, Scalar, Scalar]:
    """A general step of the weights, then one of the response around them (centred networks)."""

    def general(params: Params, model_state: ModelState) -> tuple[Scalar, ModelState]:
        weights = InnerState(params, None, model_state)
        return tuning.general(trained._replace(weights=weights), state.hparams, batch)

    def perturbed(network: Any, _: None) -> tuple[Scalar, None]:
        at = Trained(weights, InnerState(network, None))
        return tuning.perturbed(at, state.moved, noise, fold_keys(batch, 1), unroll), None

    weights, seen = take_step(general, tuning.inner_tx, trained.weights)
    network, perturbed_seen = take_step(perturbed, tuning.response_tx, trained.network)
    return Trained(weights, network), seen.loss, perturbed_seen.loss


def _together(
    tuning: Tuning,
    trained: Trained,
    state: SelfTuningState,
    noise: Hparams,
    batch: Batch,
    unroll: bool,
) -> tuple[Trained, Scalar, Scalar]:
    """One gradient for the weights and the response (uncentred networks)."""

    def perturbed(params: Params, network: Any) -> Scalar:
        at = Trained(trained.weights._replace(params=params), InnerState(network, None))
        return tuning.perturbed(at, state.moved, noise, fold_keys(batch, 1), unroll)

    params, network = trained.weights.params, trained.network.params
    loss, grads = jax.value_and_grad(perturbed, argnums=(0, 1))(params, network)
    weights, _ = take_step(
        lambda w, model_state: (perturbed(w, network), model_state),
        tuning.inner_tx,
        trained.weights,
        lambda _, model_state: ((loss, model_state), grads[0]),
    )
    moved, _ = take_step(
        lambda phi, _: (perturbed(params, phi), None),
        tuning.response_tx,
        trained.network,
        lambda *_: ((loss, None), grads[1]),
    )
    return Trained(weights, moved), loss, loss


def tune(
    tuning: Tuning,
    state: SelfTuningState,
    trained: Trained,
    outer_batch: Batch,
    key: Key,
    unroll: bool = False,
) -> tuple[Moved, Scalar, Scalar]:
    """``outer_steps`` validation steps (none in the warm-up), first loss and gradient norm.

    The first, because it is taken at the hyperparameters that the cycle reports.
    """
    batches = [outer_batch]
    if tuning.outer_steps > 1:
        batches = [select_batch(outer_batch, j) for j in range(tuning.outer_steps)]

    def one(j: int, moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        raw, raw_scales = moved.outer.moving, moved.widths.moving
        noise = tuning.noise(jax.random.fold_in(key, tuning.inner_steps + j), raw, batches[j])
        (total, value), (grads, scale_grads) = jax.value_and_grad(
            tuning.objective, argnums=(0, 1), has_aux=True
        )(raw, raw_scales, trained, noise, batches[j], unroll)
        outer, norm = tuning.mover.move(moved.outer, grads, value=total)
        widths = moved.widths
        if tuning.tune_scales:
            widths, _ = tuning.scale_mover.move(widths, scale_grads, value=total)
        return Moved(outer, widths), value, norm

    def all_steps(moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        start = moved
        moved, value, norm = one(0, moved)
        for j in range(1, tuning.outer_steps):
            moved, _, _ = one(j, moved)
        return keep_types(moved, start, "outer state", KEEP), value, norm

    if not tuning.warm_up:
        return all_steps(state.moved)

    def wait(moved: Moved) -> tuple[Moved, Scalar, Scalar]:
        problem = tuning.problem.at(trained.weights.model_state)
        weights = tuning.weights(trained, moved.outer.moving)
        value = problem.outer_loss(weights, moved.outer.hparams, batches[0])[0]
        shapes = jax.eval_shape(all_steps, moved)
        return moved, value.astype(shapes[1].dtype), jnp.zeros((), shapes[2].dtype)

    return jax.lax.cond(state.step < tuning.warm_up, wait, all_steps, state.moved)


def _check_step(
    tuning: Tuning, state: SelfTuningState, inner_batches: Batch, outer_batch: Batch
) -> bool:
    """Raise what is wrong at trace time; whether loops are to be unrolled."""

    def check(batches: Batch, steps: int, name: str, setting: str) -> Batch:
        check_stack(batches, steps, name, f"one batch for each of the {setting}={steps} steps")
        return select_batch(batches, 0)

    first = check(inner_batches, tuning.inner_steps, "inner_batches", "inner_steps")
    first_outer = outer_batch
    if tuning.outer_steps > 1:
        first_outer = check(outer_batch, tuning.outer_steps, "outer_batch", "outer_steps")
    problem = tuning.problem.at(state.model_state)
    args = (problem, tuning.undisplaced(state.trained), state.hparams)
    check_problem(*args, first, first_outer)
    check_inner(*args, first)
    check_responds(*args, first, first_outer)
    if tuning.linearize is not None:
        check_split(tuning.linearize, *args, first)
    return unrolls(tuning.unroll, problem.inner_loss, *args[1:], first)
