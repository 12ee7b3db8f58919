"""What a case is, and how its outcome is judged."""

import contextlib
import contextvars
import dis
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

import bilevel

LIBRARY = Path(bilevel.__file__).parent
HERE = Path(__file__).parent
SECONDS = 60  # many times what the slowest case takes to compile on a busy machine


class Refuse:
    """No number should exist: an error, a status or a NaN must come back."""


class Any_:
    """Legal, whatever the number (a budget was asked for, or a draw)."""


REFUSE, ANY = Refuse(), Any_()


class Number(NamedTuple):
    """What a call returned: arrays, and its status if it has one."""

    value: Any
    result: Any = 0


class Case(NamedTuple):
    """One odd call.

    Attributes:
      area: the room of the library, for the table.
      kind: of oddness, for the table.
      label: unique.
      call: ``() -> Number``.
      names: what a message may call the argument; one of them must occur.
      expect: :data:`REFUSE`, :data:`ANY`, an array (or a function that makes one): the oracle.
      rtol: how closely, relative to the largest entry of the oracle.
      own: an error raised inside the caller's own function (a loss, a callback) is theirs.
    """

    area: str
    kind: str
    label: str
    call: Callable[[], Number]
    names: tuple[str, ...]
    expect: Any = REFUSE
    rtol: float = 1e-6
    own: bool = False


class Verdict(NamedTuple):
    """``right``, ``refused``, ``marked``, ``own`` are good; ``unclear``, ``raw``, ``silent``,
    ``hang`` are not."""

    what: str
    text: str = ""


GOOD = ("right", "refused", "marked", "own")
BAD = ("unclear", "raw", "silent", "hang")
REMEDY = re.compile(
    r"\b(expected|must|pass|use|choose|give|needs?|at least|at most|instead|set|write|take|make|"
    r"split|remove|convert|start|stack|leave|raise|drop|call|return|add|swap|divide|keep|import|"
    r"install|lower|count|share|train|relax|build|should|supports?|only)\b",
    re.IGNORECASE,
)
SIGNATURE = re.compile(
    r"(missing \d+ required|unexpected keyword|takes .* positional|multiple values for) "
)


class Late(BaseException):
    """Raised by the alarm; not an ``Exception``, so that no handler swallows it."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise :class:`Late` in this (main) thread after some seconds."""

    def ring(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> Verdict:
    """Run one case as a user would: with JAX's default of silent rank promotion."""
    token = _only_traced.set(case.expect is ANY)
    with (
        contextlib.closing(_Reset(token)),
        warnings.catch_warnings(record=True) as told,
        jax.numpy_rank_promotion("allow"),
        _whole_tracebacks(),
    ):
        warnings.simplefilter("always")
        try:
            with alarm(SECONDS):
                number = case.call()
                value = [np.asarray(x, np.float64) for x in _arrays(number.value)]
                result = int(np.max(np.asarray(number.result)))
        except Late:
            return Verdict("hang", f"no answer in {SECONDS} s")
        except Exception as error:
            return _of_error(case, error)
    words = tuple(f"{status.name}:" for status in bilevel.Status)
    said = [str(w.message) for w in told if str(w.message).startswith(words)]
    return _of_number(case, value, result, said)


_only_traced: contextvars.ContextVar[bool] = contextvars.ContextVar("traced", default=False)


class _Reset(NamedTuple):
    token: Any

    def close(self) -> None:
        _only_traced.reset(self.token)


def evaluate(function: Callable[..., Any], *args: Any) -> Any:
    """``(value, result)`` of a compiled call; only traced where any number would do."""
    if _only_traced.get():
        jax.eval_shape(function, *args)
        return (), 0
    return jax.jit(function)(*args)


@contextlib.contextmanager
def _whole_tracebacks() -> Iterator[None]:
    """JAX hides its own frames by default, and with them whose error it was."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        yield
    finally:
        jax.config.update("jax_traceback_filtering", before)


def _arrays(value: Any) -> list[Any]:
    return [
        x
        for x in jax.tree.leaves(value)
        if not jax.dtypes.issubdtype(getattr(x, "dtype", np.float64), jax.dtypes.prng_key)
    ]


def _of_number(case: Case, value: list[np.ndarray], result: int, told: list[str]) -> Verdict:
    if result != 0:
        return Verdict("marked", bilevel.Status(result).name)
    if any(np.any(~np.isfinite(x)) for x in value):
        return Verdict("marked", "not finite")
    if told:
        return Verdict("marked", told[0])
    if case.expect is REFUSE:
        return Verdict("silent", f"accepted: {_short(value)}")
    if case.expect is ANY:
        return Verdict("right")
    expected = case.expect() if callable(case.expect) else case.expect
    expected = [np.asarray(x, np.float64) for x in jax.tree.leaves(expected)]
    got = np.concatenate([x.ravel() for x in value] or [np.zeros(0)])
    want = np.concatenate([x.ravel() for x in expected] or [np.zeros(0)])
    if got.shape != want.shape:
        return Verdict("silent", f"shape {got.shape} for {want.shape}")
    scale = np.max(np.abs(want), initial=0.0)
    if np.all(np.abs(got - want) <= case.rtol * scale + 1e-12):
        return Verdict("right")
    return Verdict("silent", f"{_short([got])} for {_short([want])}")


def _short(value: list[np.ndarray]) -> str:
    flat = np.concatenate([x.ravel() for x in value] or [np.zeros(0)])
    return np.array2string(flat[:4], precision=4, threshold=4)


def _of_error(case: Case, error: Exception) -> Verdict:
    text = f"{type(error).__name__}: {error}"
    named = any(_names(name, str(error)) for name in case.names)
    if type(error).__module__.startswith("bilevel"):  # `HypergradientError` and its like
        return Verdict("marked", text)
    expected_type = isinstance(error, (TypeError, ValueError, OSError, ImportError, RuntimeError))
    if SIGNATURE.search(str(error)) and isinstance(error, TypeError) and named:
        return Verdict("refused", text)  # Python's own words for a call that does not fit
    if not (expected_type and raised_by_us(error.__traceback__)):
        return Verdict("own" if case.own and raised_by_caller(error) else "raw", text)
    if case.expect is not REFUSE and case.expect is not ANY:
        return Verdict("refused", text)
    if named and REMEDY.search(str(error)):
        return Verdict("refused", text)
    return Verdict("unclear", text)


def _names(name: str, text: str) -> bool:
    quoted = rf"`[^`]*\b{re.escape(name)}\b[^`]*`"
    path = rf"(^|[^\w]){re.escape(name)}(\[|\.\w|\(| is | has | must | returned)"
    first = rf"^{re.escape(name)}\b"
    return bool(re.search(f"{quoted}|{path}|{first}", text) or name in text.split("'"))


def raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is the library's and stands at a ``raise``."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or LIBRARY not in Path(trace.tb_frame.f_code.co_filename).parents:
        return False
    opcode = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    return dis.opname[opcode] == "RAISE_VARARGS"


def raised_by_caller(error: Exception) -> bool:
    """Whether a function of the case itself (a loss) was at work below the library."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [LIBRARY in f.parents for f in files]
    last = max((i for i, our in enumerate(ours) if our), default=-1)
    return any(HERE in f.parents for f in files[last + 1 :]) if last >= 0 else False
