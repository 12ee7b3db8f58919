"""One process for one run: a lock that a killed process cannot leave behind."""

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def locked(name: str, given: Path, path: Path) -> Iterator[None]:
    """Holds the lock file ``path`` for the argument ``name``, whose value is ``given``.

    The operating system drops the lock when its process ends, however it ends; what the file
    says about that process (pid, host, start) is only for the message.

    Raises:
      BlockingIOError: while another run holds it; names the other process.
      OSError: if the file cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on this operating system
        yield
        return
    handle = None
    while handle is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(
                f"`{name}` {given} cannot be written ({error}): choose a place you may write to, "
                f"or leave `{name}` out."
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(handle)
            os.close(handle)
            raise BlockingIOError(_in_use(name, given, other)) from None
        except OSError as error:
            warnings.warn(
                f"`{name}` {given}: this file system cannot lock ({error}). See to it that no "
                "second run writes there.",
                stacklevel=5,
            )
        if not _is_at(handle, path):  # removed by its holder between our `open` and our lock
            os.close(handle)
            handle = None
    try:
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.ctime()}
        with contextlib.suppress(OSError):  # a full disk is told where it costs something
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(mine).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(name: str, given: Path, other: dict[str, Any]) -> str:
    pid, host = other.get("pid", "unknown"), other.get("host", "unknown")
    left = ""
    if host == socket.gethostname() and isinstance(pid, int) and not _alive(pid):
        left = " That process has ended, but a child of it (a data loader?) still holds the lock."
    return (
        f"`{name}` {given} is in use by another run: process {pid} on host {host}, started "
        f"{other.get('started', 'at an unknown time')}.{left} Wait for it, end it, or choose "
        f"another `{name}`."
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
