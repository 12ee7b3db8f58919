"""Time, memory, compile time and error of several implementations of one computation.

All implementations of a row are timed in one process in turns, forwards then backwards
(A B C ... C B A), so that whatever else the machine does falls on all of them alike. Reported
are medians over rounds of ratios taken within a round.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arguments = tuple[Any, Any, Any, Any, Any]
Function = Callable[..., Any]
# The first is the base of every ratio.
COLUMNS = ("jax", "bilevel", "lineax", "optimistix", "jaxopt")
GRADIENT = "gradient"


@dataclasses.dataclass(frozen=True)
class Row:
    """One computation and its implementations.

    Attributes:
      name: an identifier; records are called `NAME_COLUMN`.
      title: what is computed, for the table.
      data: where the numbers came from, for the record.
      arguments: `(params, hparams, inner_batch, outer_batch, key)` in float32. Everything
        measured is a function of these five: data are never compiled in as constants.
      inner: the inner loss, whose `value_and_grad` is the unit of cost.
      columns: for each of `COLUMNS` a function of the arguments that returns the hypergradient,
        or the reason in words why there is none.
      extras: further functions timed in the same rounds, for ratios between formulations.
      twin: the same algorithm in plain JAX, run in float64 to give the error; the hand-written
        column if `None`.
      compared: the part of what a column returns whose error is told.
    """

    name: str
    title: str
    data: str
    arguments: Arguments
    inner: Function
    columns: Mapping[str, Function | str]
    extras: Mapping[str, Function] = dataclasses.field(default_factory=dict)
    twin: Function | None = None
    compared: Callable[[Any], Any] = lambda returned: returned


def compiled(function: Function, arguments: Arguments, repeats: int) -> tuple[Any, float]:
    """The executable, and the least seconds of `repeats` traces and compilations.

    JAX's caches are emptied before each, or a column would profit from those before it.
    """
    seconds, executable = float("inf"), None
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        executable = jax.jit(lambda *args: function(*args)).trace(*arguments).lower().compile()
        seconds = min(seconds, time.perf_counter() - start)
    return executable, seconds


def interleaved(
    executables: Mapping[str, Any], arguments: Arguments, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of each executable in each round, the mean of its two calls there."""
    names = list(executables)
    order = names + names[::-1]
    seconds = {name: np.zeros(rounds) for name in names}
    for name in names:
        jax.block_until_ready(executables[name](*arguments))
    for i in range(rounds):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(executables[name](*arguments))
            seconds[name][i] += (time.perf_counter() - start) / 2
    return seconds


def relative_error(value: Any, exact: Any) -> float:
    """The worst relative 2-norm error over the leaves; NaN if any number is not finite."""

    def leaf(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))

    errors = jax.tree.leaves(jax.tree.map(leaf, value, exact))
    return float(np.max(errors))


def in_float64(function: Function, arguments: Arguments) -> Any:
    """The function at the same numbers in float64, on the host."""

    def widen(x: Any) -> Any:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        wide = jax.tree.map(widen, arguments)
        return jax.device_get(jax.jit(lambda *args: function(*args))(*wide))


def measure(row: Row, rounds: int, compilations: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """`{column: metrics}`, or `{column: reason}` where a column has nothing to measure."""
    twin = row.twin or row.columns["jax"]
    assert callable(twin)
    exact = in_float64(twin, row.arguments)
    with jax.enable_x64(False):
        return _measure(row, exact, rounds, compilations, only)


def _measure(
    row: Row, exact: Any, rounds: int, compilations: int, only: tuple[str, ...]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    executables: dict[str, Any] = {}
    for column in (*COLUMNS, *row.extras):
        function = row.extras.get(column, row.columns.get(column, "not offered"))
        if only and column not in ("jax", *only):
            continue
        if isinstance(function, str):
            results[column] = function
            continue
        try:
            # Compile times of the extras are not told.
            times = compilations if column in COLUMNS else 1
            executable, seconds = compiled(function, row.arguments, times)
        except ImportError as error:
            results[column] = f"not installed ({error.name})"
            continue
        executables[column] = executable
        results[column] = {
            "compile_seconds": seconds,
            "temp_bytes": executable.memory_analysis().temp_size_in_bytes,
        }
        if column in COLUMNS:
            results[column]["error"] = relative_error(
                row.compared(executable(*row.arguments)), row.compared(exact)
            )

    unit = jax.value_and_grad(row.inner)
    executables[GRADIENT], _ = compiled(
        lambda params, hparams, inner, outer, key: unit(params, hparams, inner), row.arguments, 1
    )
    seconds = interleaved(executables, row.arguments, rounds)
    base, gradient = results["jax"], seconds[GRADIENT]
    for column in [name for name in executables if name != GRADIENT]:
        ratios = seconds[column] / seconds["jax"]
        metrics = results[column]
        metrics |= {
            "time_ratio": float(np.median(ratios)),
            "time_ratio_low": float(np.quantile(ratios, 0.25)),
            "time_ratio_high": float(np.quantile(ratios, 0.75)),
            "gradients": float(np.median(seconds[column] / gradient)),
            "milliseconds": float(1e3 * np.median(seconds[column])),
            "temp_ratio": metrics["temp_bytes"] / max(base["temp_bytes"], 1),
            "compile_ratio": metrics["compile_seconds"] / base["compile_seconds"],
        }
    return results
