"""Checks that an outer loop, yours or ours, must pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params
from bilevel.ground.settings import check_count
from bilevel.ground.status import Status
from bilevel.outer.base import Algorithm, Info
from bilevel.run import fit
from bilevel.testing.recorded import (
    Loop,
    Record,
    begin,
    copied,
    differing,
    from_host,
    leaves_to_host,
    name_of,
    record_steps,
)

COMPARED = ("value", "inner_value", "hypergrad_norm", "hparams", "result", "cost")
"""Fields of an info that two programs agree on; ``stats`` may be residuals, all rounding."""


def check_algorithm(
    algorithm: Algorithm,
    params: Params,
    hparams: Hparams,
    *,
    inner_batches: Batch,
    outer_batch: Batch,
    response_batch: Batch = None,
    model_state: ModelState = None,
    key: Key | None = None,
    steps: int = 3,
    outer: Loss | None = None,
    inside: Callable[[Hparams], Any] | None = None,
    poison: bool = True,
    through_fit: bool = True,
    rtol: float | None = None,
    who: str = "The loop",
) -> list[Info]:
    """Hold an outer loop against the contract of :class:`~bilevel.Algorithm`.

    Checked on ``steps`` steps with the same batches, jitted with the state donated:

    * ``init`` gives strongly typed arrays, the same ones each time, and none that it was given;
    * a step keeps structure, shapes, dtypes and sharding of the state (leaves on one device may
      join the others in the first step), adds one to ``step``, and is traced once; ``info`` is
      an ``Info`` of scalars, its ``hparams`` those from before the step, its costs not negative
      (or NaN: unknown); hyperparameters stay ``inside``;
    * the caller's arrays survive the donation;
    * a state that went through NumPy, leaf by leaf, goes on to the same bits;
    * NaN in a batch is told (``info.result`` is not ``ok``, or ``info.value`` is NaN) and not
      replaced: parameters, and hyperparameters where ``info.hypergrad_norm`` is NaN, become NaN
      or stay as they were; the state from before that step still goes on to the same bits;
    * ``info.value`` is ``outer`` at the pair ``(deploy(new, info.hparams), info.hparams)``, and
      ``deploy(state)`` is ``deploy(state, state.hparams)``;
    * ``lax.scan`` over the steps and :func:`~bilevel.fit` give what the loop gave, up to
      rounding: they are other programs, in which XLA may fuse, and so round, differently.

    Args:
      algorithm: what ``alternate``, ``self_tuning`` or a function of your own returns.
      params, hparams, model_state: for ``init``; not consumed.
      inner_batches, outer_batch, response_batch: for ``step``.
      key: step i receives ``fold_in(key, i)``; ``None`` for loops that draw nothing.
      steps: at least 2.
      outer: the outer loss, ``loss(params, hparams, batch)``, with ``model_state`` as the last
        argument if that is given; may return ``(scalar, aux)``. ``None`` for a loop that
        reports another value, such as one of perturbed hyperparameters.
      inside: ``hparams -> bool``, whether they are within their bounds.
      poison: whether to try NaN; False for losses that do not read the floating-point numbers of
        their batches.
      through_fit: whether to run :func:`~bilevel.fit` too, a third of the time of this check.
      rtol: allowed relative to the largest entry of a leaf where two programs are compared;
        ``None`` for 1000 units of rounding of the leaf's dtype, which a loop that amplifies
        rounding may exceed.
      who: what messages call the loop.

    Returns:
      What each step saw, as NumPy arrays, for checks of your own (of the costs, say).

    Raises:
      CheckFailed: naming the first property that fails, and the leaf.

    Cost: three compilations of a step and one of ``deploy``.

    Example: the section "A loop" of ``docs/extend.md``.
    """
    check_count("steps", steps, 2)
    point = tuple(copied(tree) for tree in (params, hparams))
    if model_state is not None:
        point += (copied(model_state),)
    batches = {"inner_batches": inner_batches, "outer_batch": outer_batch}
    if response_batch is not None:
        batches["response_batch"] = response_batch
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(steps))
    loop = Loop(algorithm, point, batches, keys, steps, rtol, who)
    traced: list[None] = []

    def step(state: Any, batches: dict[str, Batch], key: Key | None) -> tuple[Any, Info]:
        traced.append(None)
        return algorithm.step(state, **batches, key=key)

    donated = jax.jit(step, donate_argnums=0)
    record = record_steps(loop, begin(loop), donated, inside)
    loop.require(
        len(traced) == 1 + record.settled,
        f"`step` was traced {len(traced)} times for {steps} steps: what it reads "
        "besides its arguments, and where its arrays lie, must not change.",
    )
    _check_resume(loop, record, donated, "a state that went through NumPy")
    if poison:
        _check_poison(loop, record, donated)
    _check_deploy(loop, record, outer)
    _check_scan(loop, record, step)
    if through_fit:
        _check_fit(loop, record, key)
    return record.infos


def _check_resume(loop: Loop, record: Record, donated: Callable[..., Any], what: str) -> None:
    """The second step again, from NumPy, into the tree of another ``init``."""
    fresh = jax.tree.structure(loop.algorithm.init(*loop.point))
    state = jax.tree.unflatten(fresh, jax.tree.leaves(from_host(record.states[1], record.like)))
    new, _ = donated(state, loop.batches, loop.key(1))
    for i in differing(leaves_to_host(new), record.states[2]):
        loop.require(
            False,
            f"{what} does not go on to the same bits: `{name_of(new, i)}` differs. What a step "
            "reads must be in its state.",
        )


def _check_poison(loop: Loop, record: Record, donated: Callable[..., Any]) -> None:
    """One step on each batch with NaN for its numbers."""

    def poisoned(x: Any) -> Any:
        x = jnp.asarray(x)
        return jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    old = from_host(record.states[1], record.like)
    for name in loop.batches:
        batches = {**loop.batches, name: jax.tree.map(poisoned, loop.batches[name])}
        state = from_host(record.states[1], record.like)
        new, info = donated(state, batches, loop.key(1))
        status, value = Status(int(info.result)), float(info.value)
        loop.require(
            status != Status.ok or np.isnan(value),
            f"`{name}` is NaN, but the status is ok and `info.value` {value}.",
        )
        if name == "outer_batch":
            loop.require(not np.isfinite(value), f"`{name}` is NaN, but `info.value` {value}.")
        # A derivative that does not depend on the batch (of a penalty) is right, and may be taken.
        fields = ["params"] if name == "inner_batches" else []
        if not np.isfinite(float(info.hypergrad_norm)):
            fields.append("hparams")
        for field in fields:
            got = leaves_to_host(getattr(new, field))
            kept = not differing(got, leaves_to_host(getattr(old, field)))
            loop.require(
                kept or not all(np.isfinite(x.astype(np.float64)).all() for x in got),
                f"`{name}` is NaN, but `state.{field}` moved to finite numbers, {got}: a step "
                "passes NaN on, or moves nothing.",
            )
    _check_resume(loop, record, donated, "the state from before a step with NaN")


def _check_deploy(loop: Loop, record: Record, outer: Loss | None) -> None:
    algorithm, batch = loop.algorithm, loop.batches["outer_batch"]

    @jax.jit
    def measure(new: Any, hparams: Hparams) -> Any:
        own = algorithm.deploy(new), algorithm.deploy(new, new.hparams)
        if outer is None:
            return own, None
        state = (new.model_state,) if len(loop.point) == 3 else ()
        value = outer(algorithm.deploy(new, hparams), hparams, batch, *state)
        return own, value[0] if isinstance(value, tuple) else value

    for i, info in enumerate(record.infos):
        new = from_host(record.states[i + 1], record.like)
        (own, at_own), value = measure(new, info.hparams)
        loop.close(own, at_own, "deploy(state)", "is not `deploy(state, state.hparams)`")
        if value is not None:
            loop.close(
                info.value,
                value,
                "info.value",
                f"of step {i} is not the outer loss at the pair of what is deployed for "
                "`info.hparams` and `info.hparams`",
            )


def _check_scan(loop: Loop, record: Record, step: Callable[..., Any]) -> None:
    @jax.jit
    def scanned(state: Any, batches: dict[str, Batch], keys: Any) -> Any:
        return jax.lax.scan(lambda s, k: step(s, batches, k), state, keys, length=loop.steps)

    start = from_host(record.states[0], record.like)
    state, infos = scanned(start, loop.batches, loop.keys)
    against = "after a `lax.scan` over the steps is not that after a Python loop"
    loop.close(state, record.states[-1], "state", against)
    stacked = jax.tree.map(lambda *x: np.stack(x), *record.infos)
    for name in COMPARED:
        loop.close(getattr(infos, name), getattr(stacked, name), f"info.{name}", against)


def _check_fit(loop: Loop, record: Record, key: Key | None) -> None:
    batches = loop.batches
    result = fit(
        loop.algorithm,
        loop.algorithm.init(*loop.point),
        batches["inner_batches"],
        batches["outer_batch"],
        response_data=batches.get("response_batch"),
        steps=loop.steps,
        key=key,
        progress=False,
    )
    loop.close(
        result.state, record.states[-1], "state", "after `fit` is not that after a Python loop"
    )
    best = np.min([info.value for info in record.infos])
    loop.close(
        np.asarray(result.best_value, best.dtype),
        best,
        "best_value",
        "of `fit` is not the lowest `info.value` of a Python loop",
    )
