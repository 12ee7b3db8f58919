"""What a hypergradient will need in memory, as reported by the compiler, before anything runs."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.ground import tree
from bilevel.ground.aliases import Batch, Hparams, Key, Loss, ModelState, Params
from bilevel.ground.batches import check_entries
from bilevel.ground.keys import check_key
from bilevel.hypergradient.base import Response
from bilevel.hypergradient.transform import hypergrad_solve
from bilevel.hypergradient.unroll import Unroll


class MemoryRow(NamedTuple):
    """One compiled call, in bytes on each device.

    Attributes:
      name: what the row is about.
      response: the response that was compiled.
      temp: working memory beyond arguments and results.
      arguments: parameters, hyperparameters, batches and state.
      outputs: results.
      peak: ``temp + arguments + outputs - donated``, the most that is alive at once.
      compile_seconds: what tracing and compiling this call took on this machine.
    """

    name: str
    response: Response
    temp: int
    arguments: int
    outputs: int
    peak: int
    compile_seconds: float = 0.0


class MemoryReport(NamedTuple):
    """Rows of :func:`memory_report`; ``str(report)`` is a table, ``report.row(name)`` one row."""

    rows: tuple[MemoryRow, ...]
    left_out: tuple[str, ...] = ()

    def row(self, name: str) -> MemoryRow:
        """The row of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}: there are {[row.name for row in self.rows]}.")

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [8])
        heads = "  ".join(f"{head:>12}" for head in ("temp MiB", "arguments", "peak", "compile s"))
        lines = [f"{'response':<{width}}  {heads}"]
        for row in self.rows:
            numbers = "  ".join(f"{x / 2**20:12.2f}" for x in (row.temp, row.arguments, row.peak))
            lines.append(f"{row.name:<{width}}  {numbers}  {row.compile_seconds:12.1f}")
        return "\n".join([*lines, *(f"left out: {reason}" for reason in self.left_out)])


def memory_report(
    outer: Loss,
    inner: Loss,
    response: Response | Mapping[str, Response],
    params: Params,
    *hparams: Hparams,
    inner_batch: Batch,
    outer_batch: Batch,
    state: Any = None,
    key: Key | None = None,
    has_aux: bool = False,
    has_state: bool = False,
    model_state: ModelState = None,
    donate: bool = False,
) -> MemoryReport:
    """Bytes that ``hypergrad_solve`` needs, and seconds that it compiles, per response.

    For one response in all its modes, or for several.

    Args:
      outer, inner, params, hparams, inner_batch, outer_batch, state, key, has_aux, has_state,
        model_state: as in ``hypergrad_solve``; every array may be a
        ``jax.ShapeDtypeStruct``, with a sharding where the run will have one.
      response: an ``Unroll`` is expanded into all its modes and rematerializations (forward
        mode only up to ``max_hparams``); anything else is one row; a mapping gives its own
        names and rows.
      donate: assume that ``params`` and ``state`` are donated.

    Returns:
      :class:`MemoryReport`. Numbers are XLA's own for this back end, exact for its buffers;
      they leave out the memory of the process itself.

    Cost: one compilation per row, no run.

    Raises ``ValueError``/``TypeError`` as ``hypergrad_solve`` does.

    Example:
      >>> import jax, jax.numpy as jnp, optax, bilevel
      >>> def loss(w, lam, batch):
      ...     return jnp.mean((batch @ w) ** 2) + jnp.exp(lam) * jnp.sum(w**2)
      >>> report = bilevel.memory_report(
      ...     loss, loss, {"unrolled": bilevel.Unroll(optax.sgd(0.1), steps=4)},
      ...     jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32),
      ...     inner_batch=jax.ShapeDtypeStruct((4, 5, 3), jnp.float32),
      ...     outer_batch=jax.ShapeDtypeStruct((5, 3), jnp.float32))
      >>> report.row("unrolled").arguments
      316
    """
    for name, value in (
        ("params", params),
        ("hparams", hparams),
        ("inner_batch", inner_batch),
        ("outer_batch", outer_batch),
        ("state", state),
        ("model_state", model_state),
    ):
        check_entries(value, name)
    check_key(key)
    responses, left_out = _rows(response, hparams)
    arrays = (params, hparams, inner_batch, outer_batch, state, key, model_state)
    arrays = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, (int, float)) else x, arrays)
    rows = []
    for name, one in responses.items():

        def call(params, hparams, inner_batch, outer_batch, state, key, model_state, one=one):
            return hypergrad_solve(
                outer,
                inner,
                one,
                params,
                *hparams,
                inner_batch=inner_batch,
                outer_batch=outer_batch,
                state=state,
                key=key,
                has_aux=has_aux,
                has_state=has_state,
                model_state=model_state,
            )

        began = time.perf_counter()
        compiled = jax.jit(call, donate_argnums=(0, 4) if donate else ()).lower(*arrays).compile()
        seconds = time.perf_counter() - began
        sizes = compiled.memory_analysis()
        if sizes is None:
            raise ValueError(
                f"The back end {jax.default_backend()!r} tells nothing about its memory: "
                "`memory_report` works on CPU, GPU and TPU."
            )
        temp, arguments = sizes.temp_size_in_bytes, sizes.argument_size_in_bytes
        outputs = sizes.output_size_in_bytes
        peak = temp + arguments + outputs - sizes.alias_size_in_bytes
        rows.append(MemoryRow(name, one, temp, arguments, outputs, peak, seconds))
    return MemoryReport(tuple(rows), left_out)


def _rows(
    response: Response | Mapping[str, Response], hparams: tuple[Hparams, ...]
) -> tuple[dict[str, Response], tuple[str, ...]]:
    if isinstance(response, Mapping):
        return dict(response), ()
    if not isinstance(response, Unroll):
        return {type(response).__name__: response}, ()
    if response.real_time:  # its state fits no other mode
        return {"forward, real time": response}, ()
    rows: dict[str, Response] = {}
    for mode in ("mixed", "reverse"):
        for remat in ("none", "step", "sqrt", "log"):
            name = mode if remat == "none" else f"{mode}, remat={remat}"
            rows[name] = _replaced(response, mode, remat)
    p = tree.size(hparams[0]) if hparams else 0
    if p <= response.max_hparams:
        rows["forward"] = _replaced(response, "forward", "none")
        return rows, ()
    reason = f"forward ({p} hyperparameters, more than max_hparams={response.max_hparams})"
    return rows, (reason,)


def _replaced(response: Unroll, mode: Any, remat: Any) -> Unroll:
    return Unroll(
        response.inner_tx,
        response.steps,
        response.truncate,
        mode,
        remat,
        response.max_hparams,
        False,
        response.initial,
    )
