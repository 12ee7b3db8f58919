"""Interrupts between two steps instead of inside one."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait for the end of a step; a second one does not wait.

    Yields a function that raises ``KeyboardInterrupt`` if one is due. An exception raised
    inside a compilation or a dispatch can leave JAX half way, with buffers already donated;
    between two steps there is a whole state to save. Only signals that would raise
    ``KeyboardInterrupt`` are held back (SIGINT by default; SIGTERM too, where the program has
    set ``signal.signal(signal.SIGTERM, signal.default_int_handler)``), and only in the main
    thread, where Python runs its handlers.
    """
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:
            signal.default_int_handler(number, frame)

    held: list[int] = []
    if threading.current_thread() is threading.main_thread():
        wanted = (signal.SIGINT, signal.SIGTERM)
        held = [s for s in wanted if signal.getsignal(s) is signal.default_int_handler]
    for number in held:
        signal.signal(number, note)
    try:
        yield check
        check()  # one that came after the last step is not swallowed
    finally:
        for number in held:
            signal.signal(number, signal.default_int_handler)
