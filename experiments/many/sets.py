"""The tabular sets of `many`: features, targets, and what is regressed."""

import functools
from typing import NamedTuple

import numpy as np

from experiments.common import data


class Rows(NamedTuple):
    """Features, and targets: real numbers, or -1 and 1."""

    x: np.ndarray
    y: np.ndarray

    def at(self, index: np.ndarray) -> "Rows":
        """Some of them."""
        return Rows(self.x[index], self.y[index])


class Table(NamedTuple):
    """All rows of a set."""

    x: np.ndarray
    y: np.ndarray
    classes: bool


REGRESSION = (
    "diabetes",
    "concrete",
    "energy",
    "yacht",
    "wine",
    "kin8nm",
    "california",
    "power",
    "parkinsons",
)
CLASSES = ("breast_cancer", "digits", "covtype", "ijcnn1", "a9a")
UCI = {"wine": "wine-quality-red", "power": "power-plant"}
TITLES = {
    "diabetes": "diabetes",
    "concrete": "concrete",
    "energy": "energy",
    "yacht": "yacht",
    "wine": "red wine",
    "kin8nm": "kin8nm",
    "california": "California housing",
    "power": "power plant",
    "parkinsons": "Parkinsons",
    "breast_cancer": "breast cancer",
    "digits": "digits, 3 against 8",
    "covtype": "covtype, class 2",
    "ijcnn1": "ijcnn1",
    "a9a": "a9a",
}


@functools.cache
def table(name: str) -> Table:
    """One set, as published."""
    if name in REGRESSION:
        x, y = _regression(name)
        return Table(np.asarray(x, np.float64), np.asarray(y, np.float64), False)
    x, y = _classes(name)
    return Table(np.asarray(x, np.float64), np.where(y, 1.0, -1.0), True)


def rows(name: str, count: int, most: int, seed: int) -> tuple[Rows, Rows]:
    """`count` rows to fit and tune on, and at most so many others that test.

    Everything is standardized by the rows to fit. Of regressions the features are joined by their
    squares and products.
    """
    whole = table(name)
    order = np.random.default_rng(seed).permutation(len(whole.y))
    order, fit = order[: count + most], slice(0, count)
    x, y = _standard(whole.x[order], fit), whole.y[order]
    if not whole.classes:
        i, j = np.triu_indices(x.shape[1])
        x = _standard(np.concatenate([x, x[:, i] * x[:, j]], 1)[:, _kept(name)], fit)
        y = (y - y[fit].mean()) / y[fit].std()
    return Rows(x[fit], y[fit]), Rows(x[count:], y[count:])


def _standard(x: np.ndarray, fit: slice) -> np.ndarray:
    """Mean 0 and deviation 1, where it varies; cut far out, where squares explode."""
    scale = x[fit].std(0)
    return np.clip((x - x[fit].mean(0)) / np.where(scale > 1e-9, scale, np.inf), -6, 6)


@functools.cache
def _kept(name: str) -> np.ndarray:
    """Columns that do not repeat another one up to a scale and a shift (a square of two values)."""
    x = table(name).x
    x = (x - x.mean(0)) / x.std(0)
    i, j = np.triu_indices(x.shape[1])
    x = np.concatenate([x, x[:, i] * x[:, j]], 1)
    scale = x.std(0)
    z = (x - x.mean(0)) / np.where(scale > 1e-9, scale, np.inf)
    same = np.triu(np.abs(z.T @ z / len(z)) > 1 - 1e-9, 1)
    return np.flatnonzero(~same.any(0) & (scale > 1e-9))


def _regression(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "diabetes":
        return _joined(data.diabetes())
    if name == "parkinsons":
        return _joined(data.parkinsons())
    if name == "california":
        x, y = _joined(data.california_housing())
        # Counts and incomes have long tails.
        return np.concatenate([x[:, :3], np.log(x[:, 3:])], 1), y
    return _joined(data.uci_regression(UCI.get(name, name)))


def _classes(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "breast_cancer":
        from sklearn.datasets import load_breast_cancer

        x, y = load_breast_cancer(return_X_y=True)
        return np.asarray(x), np.asarray(y) == 1
    if name == "digits":
        x, y = _joined(data.digits())
        kept = (y == 3) | (y == 8)
        return x.reshape(len(x), -1)[kept], y[kept] == 3
    x, y = _joined(data.covtype() if name == "covtype" else data.libsvm(name))
    return x, y == 1


def _joined(parts: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts])
