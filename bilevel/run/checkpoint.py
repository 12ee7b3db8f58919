r"""A folder of checkpoints that survives being killed at any moment.

A checkpoint is one folder, ``00000120`` after 120 steps: the arrays as orbax writes them, and
``manifest.json`` with the SHA-256 of every file, of itself, and the fingerprint of the run. It
is written under another name and renamed when complete, so a folder with a number is either
whole or was damaged afterwards, which the digests show.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.ground.tree import paths
from bilevel.run.processes import all_well, by_writer, wait_for_all

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_WRITING = ".writing-"
_DAMAGED = "damaged-"


class Restored(NamedTuple):
    """A checkpoint that was read: the tree, the number of steps it has made, and its notes."""

    tree: Any
    step: int
    notes: dict[str, Any]


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            f"`checkpoint_dir` needs orbax, which cannot be imported ({error}): pip install "
            '"bilevel[fit]", or leave out `checkpoint_dir`.'
        ) from error
    return orbax.checkpoint


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _signature(tree: Any) -> list[str]:
    """One line per leaf: path, dtype, shape."""
    return [
        f"{path}: {jnp.result_type(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"
        for path, leaf in paths(tree, "")
    ]


def _arrays(tree: Any) -> dict[str, Any]:
    """The leaves by number, typed keys as the integers they hold; empty arrays need no file."""
    out = {}
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        if np.size(leaf):
            out[f"{i:05d}"] = leaf
    return out


def _from_arrays(arrays: dict[str, Any], like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    out = []
    for i, leaf in enumerate(leaves):
        value = arrays.get(f"{i:05d}", leaf)
        if _is_key(leaf):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
        out.append(value)
    return jax.tree.unflatten(treedef, out)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }


def _body_digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Make a file or folder durable, so that a rename never outlives what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they are kept; made if missing, and tried for writing at once.
      keep: how many to keep; with at least 2, a damaged newest one costs little.
      identity: what tells this run from others: named values as JSON gives them back.
      caller: the public function that continues from them, for messages.

    Raises:
      OSError: if the folder cannot be written.
      ImportError: without orbax.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int,
        identity: dict[str, Any],
        caller: str = "fit",
    ):
        self._orbax = _orbax()
        self.caller = caller
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.identity = identity
        by_writer(self._prepare)

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f"{_WRITING}probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"`checkpoint_dir` {self.folder} cannot be written ({error}): choose a folder "
                "you may write to, or leave it out to run without checkpoints."
            ) from error
        for left in self.folder.glob(f"{_WRITING}*"):  # by a process that was killed
            shutil.rmtree(left)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        names = (p.name for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{8,}", name))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, or None."""
        steps = self.steps()
        return self._path(steps[-1]) if steps else None

    def save(self, step: int, tree: Any, notes: dict[str, Any]) -> Path:
        """Write ``tree`` as the checkpoint after ``step`` steps, then drop the oldest.

        Raises:
          OSError: if it cannot be written; the older ones are then as they were.
        """
        writing = self.folder / f"{_WRITING}{step:08d}"
        try:
            self._write(writing, step, tree, notes)
        except Exception as error:  # orbax reports a full disk in several ways
            shutil.rmtree(writing, ignore_errors=True)
            newest = self.newest()
            last = "there is none yet" if newest is None else f"the last one is {newest}"
            raise OSError(
                f"`checkpoint_dir` {self.folder} could not take the checkpoint after step {step} "
                f"({type(error).__name__}: {error}). Earlier checkpoints are whole: {last}. Free "
                f"space on that disk and call `{self.caller}` again to go on from there, or lower "
                "`keep`."
            ) from error
        by_writer(self._drop_old)
        return self._path(step)

    def _drop_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def _write(self, writing: Path, step: int, tree: Any, notes: dict[str, Any]) -> None:
        """Every process writes its part of the arrays, one the rest."""
        arrays = _arrays(tree)
        with self._checkpointer() as checkpointer:
            checkpointer.save(
                writing / _ARRAYS, args=self._orbax.args.StandardSave(arrays), force=True
            )
        by_writer(lambda: self._complete(writing, step, tree, notes))

    def _complete(self, writing: Path, step: int, tree: Any, notes: dict[str, Any]) -> None:
        body = {
            "step": step,
            "identity": self.identity,
            "signature": _signature(tree),
            "notes": notes,
            "files": _files(writing),
        }
        manifest = writing / _MANIFEST
        manifest.write_text(json.dumps({"sha256": _body_digest(body), "body": body}, indent=1))
        for path in writing.rglob("*"):
            _sync(path)
        _sync(writing)
        if self._path(step).exists():  # a run that went back: this one replaces it
            self._remove(step)
        os.rename(writing, self._path(step))
        _sync(self.folder)

    def _remove(self, step: int) -> None:
        """Renamed first: a folder with a number is never half deleted."""
        going = self.folder / f"{_WRITING}old-{step:08d}"
        os.rename(self._path(step), going)
        shutil.rmtree(going)

    def restore(
        self, like: Any, is_finite: Callable[[Any], bool] = lambda tree: True
    ) -> Restored | None:
        """The newest checkpoint that is whole and finite, in the types and shardings of ``like``.

        Others that are newer are set aside under the name ``damaged-...``, with a warning that
        names them and the one used instead. None if there is none at all.

        Raises:
          ValueError: for a checkpoint of another run.
          OSError: if every checkpoint is damaged or not finite.
        """
        wait_for_all()  # what one process removed is not listed by another
        steps = self.steps()
        damaged: list[tuple[Path, str]] = []
        for step in reversed(steps):
            path = self._path(step)
            body, trouble = self._verify(path, step)
            if not all_well(body is not None) or body is None:
                damaged.append((path, trouble or "another process could not read it"))
                continue
            self._check_same_run(path, body, like)
            loaded = self._load(path, like)
            if not is_finite(loaded):
                damaged.append((path, "it holds NaN or infinite parameters"))
                continue
            wait_for_all()
            by_writer(functools.partial(self._set_aside, damaged, path))
            return Restored(loaded, step, body["notes"])
        if damaged:
            listed = "; ".join(f"{path}: {trouble}" for path, trouble in damaged)
            raise OSError(
                f"every checkpoint in {self.folder} is damaged ({listed}). Restore the folder "
                "from a backup, or remove it to start over."
            )
        return None

    def read(self, step: int, like: Any) -> Any:
        """The tree of one checkpoint.

        Raises:
          OSError: if it is damaged.
        """
        body, trouble = self._verify(self._path(step), step)
        if body is None:
            raise OSError(f"checkpoint {self._path(step)} is damaged ({trouble})")
        return self._load(self._path(step), like)

    def _checkpointer(self) -> Any:
        return self._orbax.Checkpointer(self._orbax.StandardCheckpointHandler())

    def _verify(self, path: Path, step: int) -> tuple[dict[str, Any] | None, str]:
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
            body = manifest["body"]
            whole = manifest["sha256"] == _body_digest(body) and body["step"] == step
        except (OSError, ValueError, KeyError, TypeError):
            whole, body = False, {}
        if not whole:
            return None, f"{_MANIFEST} is missing or was altered"
        files = _files(path)
        for name, digest in body["files"].items():
            if name not in files:
                return None, f"{name} is missing"
            if files[name] != digest:
                return None, f"{name} was truncated or altered"
        return body, ""

    def _check_same_run(self, path: Path, body: dict[str, Any], like: Any) -> None:
        remedy = (
            "Choose another `checkpoint_dir`, remove this folder to start over, or continue with "
            "the settings it was made with."
        )
        for name, mine in self.identity.items():
            theirs = body["identity"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"{path} is a checkpoint of another run: its `{name}` is {theirs!r}, this "
                    f"run's is {mine!r}. {remedy}"
                )
        mine, theirs = _signature(like), body["signature"]
        if mine != theirs:
            only = [line for line in theirs if line not in mine]
            here = [line for line in mine if line not in theirs]
            raise ValueError(
                f"{path} is a checkpoint of another run: it holds {only[0] if only else 'less'}, "
                f"this run's state {here[0] if here else 'less'}. {remedy}"
            )

    def _load(self, path: Path, like: Any) -> Any:
        def target(x: Any) -> Any:
            x = jnp.asarray(x)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        targets = jax.tree.map(target, _arrays(like))
        with self._checkpointer() as checkpointer:
            arrays = checkpointer.restore(
                path / _ARRAYS, args=self._orbax.args.StandardRestore(targets)
            )
        return _from_arrays(arrays, like)

    def _set_aside(self, damaged: list[tuple[Path, str]], used: Path) -> None:
        for path, trouble in damaged:
            aside = path.with_name(_DAMAGED + path.name)
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(path, aside)
            warnings.warn(
                f"checkpoint {path} is damaged ({trouble}): continuing from {used} instead. The "
                f"damaged one is kept as {aside.name}.",
                stacklevel=4,
            )
