"""What is reported of a step: a record of plain numbers, as the log holds it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.ground.aliases import Hparams
from bilevel.ground.status import Status
from bilevel.ground.tree import accumulate, named_leaves

Record = dict[str, Any]

SMALL = 16
"""A hyperparameter array of up to this many entries is written out; a larger one is summed up."""

HALVINGS = 20
"""Steps of the bisection for a median, which is exact to the range of the entries by 2 ** 20."""


def numbers_of(info: Any, hparams: Hparams) -> dict[str, Any]:
    """Every scalar of an outer step by its name in the log, and the hyperparameters.

    Of a hyperparameter array with more than ``SMALL`` entries: norm, least, median, mean and
    largest.
    """
    numbers = {"outer_loss": info.value}
    names = {"inner_value": "inner_loss", "hypergrad_norm": "hypergrad_norm", "result": "status"}
    for field, name in names.items():
        if hasattr(info, field):
            numbers[name] = getattr(info, field)
    numbers.update(getattr(info, "stats", None) or {})
    if hasattr(info, "cost"):
        numbers["cost"] = info.cost.total
    for path, leaf in named_leaves(getattr(info, "aux", None), "").items():
        if jnp.shape(leaf) == () and not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            numbers[f"aux/{path}".rstrip("/")] = leaf
    numbers["hparams"] = {}
    for path, leaf in named_leaves(hparams, "hparams").items():
        told = {path: leaf} if jnp.size(leaf) <= SMALL else _summary(path, leaf)
        numbers["hparams"].update(told)
    return jax.tree.map(jnp.asarray, numbers)


def _summary(path: str, leaf: jax.Array) -> dict[str, jax.Array]:
    x = accumulate(leaf)
    low, high = jnp.min(x), jnp.max(x)
    return {
        f"{path}/norm": jnp.sqrt(jnp.sum(x * x)),
        f"{path}/min": low,
        f"{path}/median": _median(x, low, high),
        f"{path}/mean": jnp.mean(x),
        f"{path}/max": high,
    }


def _median(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The least entry that half of all do not exceed, by counting: a sort would gather shards."""

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) / 2
        enough = 2 * jnp.sum(x <= middle) >= x.size
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return jax.lax.fori_loop(0, HALVINGS, halve, (low, high))[1]


def record_of(
    step: int, numbers: dict[str, Any], evaluated: float | None, seconds: float
) -> Record:
    """The same as Python numbers and lists, in the order of the log."""
    record: Record = {"step": step}
    first = ("outer_loss", "inner_loss", "hypergrad_norm", "status")
    record.update((name, numbers[name]) for name in first if name in numbers)
    record.update((name, numbers[name]) for name in numbers if name not in first)
    if "status" in record:
        record["status"] = Status(record["status"]).name
    if evaluated is not None:
        record["evaluate"] = evaluated
    record["seconds"] = seconds
    return record


def as_json(value: Any) -> Any:
    """``value`` as strict JSON; what JSON cannot say (nan, inf) as text, so nothing is lost."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(value: Any) -> Any:
    """The inverse of :func:`as_json`."""
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
