"""Output folders: which run a folder holds, and whether another may write into it."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.common import record

FILE = "run.json"
LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "flax")
# What makes two runs the same run. The seeds are not part of it: a run may be given more of them.
IDENTITY = (
    "experiment", "preset", "config", "methods", "revision", "code", "versions", "device", "x64",
)  # fmt: skip


class RunnerError(Exception):
    """Something the person at the terminal can put right; printed without a traceback."""


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ("git", "-C", str(root), *arguments),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _code(folders: tuple[Path, ...]) -> str:
    """A digest of the Python sources, which tells apart two states that are not committed."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def describe(
    name: str,
    preset: str,
    config: Any,
    folder: Path,
    *,
    methods: Sequence[str] | None = None,
    changed: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that says which run this is and on what it runs; no path of the machine.

    `methods` are those of a run of some methods only, `changed` the settings that are not as the
    preset has them.
    """
    import jax

    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{name}: config.{preset}() must return a dataclass, not {type(config)}")
    root = folder.parent.parent
    # Summaries and figures kept by an earlier run are no part of what this one executes.
    parts = ("bilevel", "experiments", ":(exclude,glob)experiments/*/results/**")
    changes = _git(root, "status", "--porcelain", "--", *parts)
    devices = jax.devices()
    return record.restored(
        record.plain(
            {
                "experiment": name,
                "preset": preset,
                "config": asdict(config),
                "methods": methods,
                "changed": changed,
                "revision": _git(root, "rev-parse", "HEAD") or "not a git checkout",
                "dirty": bool(changes),
                "code": _code((root / "bilevel", folder.parent / "common", folder)),
                "versions": {
                    "python": platform.python_version(),
                    **{library: importlib.metadata.version(library) for library in LIBRARIES},
                },
                "device": f"{len(devices)} x {devices[0].device_kind}",
                "x64": bool(jax.config.read("jax_enable_x64")),
                "cores": os.cpu_count() or 1,
            }
        )
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(set(old) | set(new)):
        mine, theirs = new.get(key, "absent"), old.get(key, "absent")
        if isinstance(mine, dict) and isinstance(theirs, dict):
            lines += _differences(theirs, mine, f"{prefix}{key}.")
        elif mine != theirs:
            lines.append(f"{prefix}{key}: there {theirs!r}, now {mine!r}")
    return lines


def claim(
    out: Path, identity: dict[str, Any], seeds: Sequence[int], resume: bool
) -> dict[str, Any]:
    """Makes the folder hold this run, or refuses because it holds another one.

    Returns:
        The content of `run.json`; of a resumed run, with what was done already.
    """
    path = out / FILE
    if out.exists() and not out.is_dir():
        raise RunnerError(f"--out {out} is a file; name a folder")
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise RunnerError(
                f"{out} is not empty and holds no run; name another folder with --out"
            )
        if resume:
            raise RunnerError(f"{out} holds no run to resume; leave out --resume to start one")
        started = {"started": now(), "ended": None, "minutes": 0.0, "status": "running"}
        return {**identity, **started, "seeds": list(seeds), "begun": [], "done": []}
    try:
        old = record.read_json(path)
    except ValueError as error:
        raise RunnerError(
            f"{path} cannot be read ({error}); delete {out} or name another"
        ) from None
    differences = _differences(
        {key: old.get(key) for key in IDENTITY}, {key: identity[key] for key in IDENTITY}
    )
    if differences:
        raise RunnerError(
            f"{out} holds another run, and results of two runs are never mixed:\n  "
            + "\n  ".join(differences)
            + "\nName another folder with --out, delete this one, or go back to what made it."
        )
    if not resume:
        raise RunnerError(
            f"{out} already holds this run ({old['status']}, seeds done: {old['done']}). "
            "Continue it with --resume, name another folder with --out, or delete it."
        )
    seeds_wanted = sorted({*old["seeds"], *seeds})
    return {**old, "seeds": seeds_wanted, "status": "running", "ended": None}


def save(out: Path, run: dict[str, Any]) -> None:
    """Writes `run.json`."""
    try:
        record.write_json(out / FILE, run)
    except OSError as error:
        raise RunnerError(
            f"the output folder {out} cannot be written ({error.strerror}); name another with --out"
        ) from None
