"""Checks of the arguments of ``fit``, made before anything runs or is written."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.keys import check_key
from bilevel.ground.settings import check_takes, is_function
from bilevel.outer.base import check_arrays

ON_NONFINITE = ("raise", "skip", "stop")


def check_run(alg: Any, state: Any, key: Any) -> None:
    """Refuse what cannot be driven: another ``alg``, ``state`` or ``key``."""
    if not (hasattr(alg, "init") and hasattr(alg, "step")):
        raise TypeError(f"`alg` must be a pair (init, step) such as `alternate(...)`, got {alg!r}.")
    missing = [name for name in ("params", "hparams", "step") if not hasattr(state, name)]
    if missing:
        raise TypeError(
            f"`state` must be what `alg.init` returns; it has no {', '.join(missing)}: "
            f"{type(state).__name__}."
        )
    if not callable(alg.step):
        raise TypeError(f"`alg.step` must be a function, got {_short(alg.step)}.")
    step = state.step
    if not jnp.issubdtype(getattr(step, "dtype", type(step)), np.integer) or np.shape(step) != ():
        raise TypeError(
            f"`state` must be what `alg.init` returns, one run with its count of steps; its `step` "
            f"is {_short(step)}."
        )
    check_arrays(state)
    check_key(key)


def check_count(name: str, value: Any, low: int, what: str) -> None:
    """Refuse anything but a Python integer of at least ``low``; ``what`` it counts."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` must be a Python int of at least {low}, the number of {what}, got "
            f"{_short(value)}."
        )
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, the number of {what}, got {value}.")


def check_path(name: str, value: Any, *, folder: bool) -> Path | None:
    """The path that was given, or None; refuses what is no path, and a file for a folder."""
    if value is None:
        return None
    example = "a folder such as 'runs/1'" if folder else "a file such as 'runs/1/log.jsonl'"
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"`{name}` must be {example} (str or pathlib.Path), got {_short(value)}.")
    if not text:
        raise ValueError(f"`{name}` is empty: pass {example}, or leave it out.")
    if "\0" in text:
        raise ValueError(f"`{name}` holds a null character: pass {example}.")
    path = Path(text)
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"`{name}` {path} is a file: pass {example}.")
    if not folder and path.is_dir():
        raise IsADirectoryError(
            f"`{name}` {path} is a folder: pass a file in it, such as {path / 'log.jsonl'}."
        )
    return path


def check_callbacks(callbacks: Any) -> None:
    """Refuse what is not a list or tuple of functions."""
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        hint = ": write `callbacks=[callback]`" if callable(callbacks) else ""
        raise TypeError(
            "`callbacks` must be a list or tuple of functions callback(step, record), got "
            f"{_short(callbacks)}{hint}."
        )
    for i, callback in enumerate(callbacks):
        if not is_function(callback):
            raise TypeError(
                f"`callbacks[{i}]` must be a function callback(step, record), got "
                f"{_short(callback)}."
            )
        check_takes(f"callbacks[{i}]", callback, "callback(step, record)")


def check_choices(on_nonfinite: Any, evaluate: Any, progress: Any) -> None:
    """Refuse settings that are none of the few things they may be."""
    if not isinstance(on_nonfinite, str) or on_nonfinite not in ON_NONFINITE:
        raise (ValueError if isinstance(on_nonfinite, str) else TypeError)(
            f"`on_nonfinite` must be one of {', '.join(map(repr, ON_NONFINITE))}, got "
            f"{_short(on_nonfinite)}."
        )
    if evaluate is not None:
        if not is_function(evaluate):
            raise TypeError(
                f"`evaluate` must be a function point -> float, got {_short(evaluate)}."
            )
        check_takes("evaluate", evaluate, "evaluate(point)")
    if not isinstance(progress, (bool, np.bool_)):
        raise TypeError(f"`progress` must be True or False, got {_short(progress)}.")


def as_json(run_id: Any) -> Any:
    """``run_id`` as JSON gives it back, or an error that says why it cannot be compared."""
    try:
        return json.loads(json.dumps(run_id, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            "`run_id` must be a JSON value (text, finite numbers, lists, dicts with text keys), "
            f"because it is written beside every checkpoint: {error}. Convert arrays with "
            "`.tolist()` and objects with `str(...)`."
        ) from None


def key_id(key: Any) -> Any:
    """A key as a JSON value, to tell runs apart."""
    if key is None:
        return None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return [str(jax.random.key_impl(key)), np.asarray(jax.random.key_data(key)).tolist()]
    return np.asarray(key).tolist()


def as_number(evaluated: Any, step: int) -> float:
    """What ``evaluate`` returned, as a float."""
    try:
        array = np.asarray(evaluated)
    except (TypeError, ValueError):
        array = np.asarray(None)
    known = array.dtype.kind in "iuf" or jnp.issubdtype(array.dtype, jnp.floating)
    if array.ndim or not known:
        raise TypeError(
            f"`evaluate` must return one real number, lower is better, got {_short(evaluated)} at "
            f"step {step}{': it has no `return`' if evaluated is None else ''}."
        )
    return float(array)


def wants_to_stop(answer: Any, place: int, step: int) -> bool:
    """What a callback returned: None and False go on, True stops."""
    if answer is None or isinstance(answer, bool):
        return bool(answer)
    # NumPy's and JAX's booleans are what comparisons of their numbers give.
    if getattr(answer, "dtype", None) == np.bool_ and np.shape(answer) == ():
        return bool(answer)
    raise TypeError(
        f"`callbacks[{place}]` returned {_short(answer)} at step {step}: return True to end this "
        "call, None or False to go on."
    )


def _short(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"{text} of type {type(value).__name__}"
