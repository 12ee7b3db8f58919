"""What pictures are drawn from: runs as lists of records, their columns, and named arrays."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bilevel.ground.tree import named_leaves
from bilevel.run.record import Record, from_json
from bilevel.run.result import FitResult

Run: TypeAlias = FitResult | Sequence[Record] | str | os.PathLike[str]
"""A run: what ``fit`` returned, its ``history``, or the path of its ``log``."""


def history_of(run: Any) -> list[Record]:
    """The records of a run.

    Raises:
      TypeError, ValueError: for anything that has none.
    """
    if isinstance(run, FitResult):
        found = run.history
    elif isinstance(run, (str, os.PathLike)):
        lines = Path(run).read_text("utf-8").splitlines()
        found = [from_json(json.loads(line)) for line in lines if line.strip()]
    else:
        found = run
    if isinstance(found, Mapping) or not isinstance(found, Sequence):
        raise TypeError(
            "`run` must be what `fit` returned, its `history`, or the path of its `log`, got "
            f"{type(run).__name__}."
        )
    if not found or not all(isinstance(r, Mapping) and "step" in r for r in found):
        raise ValueError("`run` has no records with a `step`: nothing was logged to be drawn.")
    return list(found)


def named_runs(runs: Any) -> dict[str, list[Record]]:
    """Runs by name; a single run, and runs without names, are counted from 0."""
    if isinstance(runs, Mapping):
        return {str(name): history_of(run) for name, run in runs.items()}
    if isinstance(runs, (FitResult, str, os.PathLike)):
        runs = [runs]
    elif isinstance(runs, Sequence) and runs and isinstance(runs[0], Mapping):
        runs = [runs]  # a history
    every = list(runs)
    return {f"run {i}": history_of(run) for i, run in enumerate(every)}


def column(history: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the number ``name``."""
    kept = [(r["step"], r[name]) for r in history if isinstance(r.get(name), (int, float))]
    steps, values = np.array(kept, float).reshape(-1, 2).T
    return steps, values


def ratio(history: Sequence[Record], above: str, below: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``above / below``, where both are there and ``below`` is not zero."""
    kept = [(r["step"], r[above] / r[below]) for r in history if above in r and r.get(below)]
    steps, values = np.array(kept, float).reshape(-1, 2).T
    return steps, values


def hyperparameters(history: Sequence[Record]) -> dict[str, np.ndarray]:
    """Every logged hyperparameter by name, (steps,); entries of small arrays are ``name[i]``."""
    columns: dict[str, np.ndarray] = {}
    logged = [r["hparams"] for r in history if "hparams" in r]
    if not logged:
        raise ValueError("`run` has no `hparams` in its records: draw what `fit` logged.")
    for name in logged[0]:
        values = np.array([h[name] for h in logged], float)
        flat = values.reshape(len(values), -1)
        if flat.shape[1] == 1:
            columns[name] = flat[:, 0]
        else:
            columns |= {f"{name}[{i}]": flat[:, i] for i in range(flat.shape[1])}
    return columns


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree as float arrays, by a path such as ``layer/kernel``."""
    return {name: np.asarray(leaf, float) for name, leaf in named_leaves(tree, "values").items()}
