"""The tasks of `sparse`: real data as batches of `problem.py`, and what is tuned on each."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from experiments.common import data
from experiments.sparse import problem
from experiments.sparse.config import Config

GROUPS = (3, 4)  # comp.sys.ibm.pc.hardware and comp.sys.mac.hardware, hard to tell apart
SEEN = 3  # documents of the publisher's training part that a term must be seen in
PADDED = 0.6  # of the entries of both halves: a bound for each, so that shapes do not move


class Task(NamedTuple):
    """One problem on one seed.

    Attributes:
      name: of the task.
      fit, held: what the inner problem trains on and what its solution is judged on.
      full, test: all rows but those of the test part, and the test part; a single fold.
      shape: of the parameters, (folds, features, outputs).
      top: log of the smallest penalty at which every weight is zero.
      leaves: name to shape of the log penalties that are tuned.
      rows: (x, y, folds) as NumPy for scikit-learn, or None where it has no rival.
    """

    name: str
    fit: Any
    held: Any
    full: Any
    test: Any
    shape: tuple[int, int, int]
    top: float
    leaves: dict[str, tuple[int, ...]]
    rows: Any


def make(name: str, config: Config, seed: int) -> Task:
    """A task on the rows that ``seed`` draws."""
    return {
        "lasso": _housing,
        "weighted": _housing,
        "elastic_net": _diabetes,
        "logistic": _news,
        "classes": _images,
    }[name](name, config, seed)


def tolerance(task: Task, relative: float) -> jax.Array:
    """Of a solve, as a part of the smallest penalty at which every weight is zero."""
    return jnp.float32(relative * math.exp(task.top))


def hparams_at(task: Task, value: dict[str, Any]) -> Any:
    """Log penalties from values relative to the top, each filled to its shape."""
    return {
        leaf: jnp.broadcast_to(jnp.asarray(task.top + value[leaf], jnp.float32), shape)
        for leaf, shape in task.leaves.items()
    }


def _task(
    name: str, fit: Any, held: Any, full: Any, test: Any, outputs: int, leaves: Any, rows: Any
) -> Task:
    shape = (len(fit["weights"]), fit["x"].shape[1], outputs)
    top = float(jnp.log(jax.jit(problem.largest)(jnp.zeros(shape), fit)))
    measure = jax.jit(problem.step_size)
    fit = {**fit, "step_size": measure(jnp.zeros(shape), fit)}
    full = {**full, "step_size": measure(jnp.zeros((1, *shape[1:])), full)}
    return Task(name, fit, held, full, test, shape, top, leaves, rows)


def _single(x: Any, y: Any, rows: int | None = None) -> Any:
    """A batch of one fold that weighs all rows alike."""
    count = len(y) if rows is None else rows
    return {"x": x, "y": jnp.asarray(y), "weights": jnp.full((1, len(y)), 1 / count, jnp.float32)}


def _folded(
    name: str, x: np.ndarray, y: np.ndarray, test: data.Split, config: Config, seed: int,
    leaves: Any,
) -> Task:  # fmt: skip
    """Cross-validation: every fold sees the same design, with weights of its own."""
    part = np.random.default_rng([seed, 5]).permutation(len(y)) % config.folds
    held = np.stack([part == k for k in range(config.folds)])
    x, y = x.astype(np.float32), y.astype(np.float32)
    shared = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def weights(mask: np.ndarray, folds: int) -> jax.Array:
        return jnp.asarray(mask / mask.sum(1, keepdims=True) / folds, jnp.float32)

    return _task(
        name,
        {**shared, "weights": weights(~held, 1)},
        {**shared, "weights": weights(held, config.folds)},
        _single(shared["x"], y),
        _single(jnp.asarray(test.x, jnp.float32), test.y.astype(np.float32)),
        1,
        leaves,
        (x, y, [(np.flatnonzero(~h), np.flatnonzero(h)) for h in held]),
    )


def _products(x: np.ndarray, degree: int) -> np.ndarray:
    """All products of up to ``degree`` columns that are not columns already."""
    from sklearn.preprocessing import PolynomialFeatures

    return np.asarray(PolynomialFeatures(degree, include_bias=False).fit_transform(x))


def _standard(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns of mean zero and variance one on the training rows."""
    return (x - train.mean(0)) / np.maximum(train.std(0), 1e-12)


def _regression(
    name: str, sets: data.Dataset, degree: int, config: Config, seed: int, leaves: Any
) -> Task:
    """Standardized products of standardized columns, and a target of mean zero, variance one."""
    x = np.concatenate([sets.train.x, sets.valid.x])
    y = np.concatenate([sets.train.y, sets.valid.y])
    products = _products(_standard(x, x), degree)
    kept = np.unique(products.round(9), axis=1, return_index=True)[1]  # the square of a sex is it
    kept = np.sort(kept)
    test = _products(_standard(sets.test.x, x), degree)[:, kept]
    products = products[:, kept]
    tested = data.Split(_standard(test, products), _standard(sets.test.y, y))
    return _folded(
        name, _standard(products, products), _standard(y, y), tested, config, seed, leaves
    )


def _housing(name: str, config: Config, seed: int) -> Task:
    """California housing: 500 rows, 164 products of up to three columns."""
    total = 20_640
    sets = data.california_housing(valid=config.rows // 2, test=total - config.rows, seed=seed)

    def logs(part: data.Split) -> data.Split:
        x = part.x.copy()
        x[:, 3:] = np.log(x[:, 3:])  # counts of rooms, people, households; the income
        return data.Split(x, part.y)

    features = {"lasso": (), "weighted": (164, 1)}[name]
    parts = data.Dataset(*(logs(part) for part in sets))
    return _regression(name, parts, 3, config, seed, {"l1": features})


def _diabetes(name: str, config: Config, seed: int) -> Task:
    """Diabetes: 342 rows, the 64 products of up to two columns."""
    sets = data.diabetes(seed=seed)
    return _regression(name, sets, 2, config, seed, {"l1": (), "l2": ()})


def _images(name: str, config: Config, seed: int) -> Task:
    """Images of ten classes, softmax; hold-out; a penalty for each class."""
    if config.images == "digits":
        sets = data.digits(valid=500, seed=seed)
    else:
        sets = getattr(data, config.images)(seed=seed)
    batches, order = {}, np.random.default_rng([seed, 7])
    for part, split in zip(("train", "valid", "test"), sets, strict=True):
        count = len(split.y) if part == "test" else config.rows
        chosen = order.permutation(len(split.y))[:count]
        x = split.x[chosen]
        if x.shape[1] == 28:
            x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        batches[part] = data.Split(x.reshape(count, -1), split.y[chosen].astype(np.int32))
    mean = batches["train"].x.mean(0)
    x = {part: jnp.asarray(split.x - mean) for part, split in batches.items()}
    both = jnp.concatenate([x["train"], x["valid"]])
    y = np.concatenate([batches["train"].y, batches["valid"].y])
    return _task(
        name,
        _single(x["train"], batches["train"].y),
        _single(x["valid"], batches["valid"].y),
        _single(both, y),
        _single(x["test"], batches["test"].y),
        10,
        {"l1": (10,)},
        None,
    )


def _padded(matrix: Any, entries: int) -> BCOO:
    """A scipy matrix with zeros at its first place, up to a number of entries: one shape."""
    coo = matrix.tocoo()
    missing = entries - coo.nnz
    if missing < 0:
        raise ValueError(f"{coo.nnz} entries do not fit into {entries}")
    indices = np.stack([coo.row, coo.col], 1).astype(np.int32)
    indices = np.concatenate([np.zeros((missing, 2), np.int32), indices])
    values = np.concatenate([np.zeros(missing, np.float32), coo.data.astype(np.float32)])
    return BCOO((jnp.asarray(values), jnp.asarray(indices)), shape=matrix.shape)


def _news(name: str, config: Config, seed: int) -> Task:
    """Two groups of 20 newsgroups, TF-IDF of 5630 terms; hold-out by halves; a sparse design."""
    import scipy.sparse
    from sklearn.feature_extraction.text import TfidfTransformer

    sets = data.newsgroups(valid=1, seed=seed)
    seen: Any = scipy.sparse.vstack([sets.train.x, sets.valid.x]).tocsr()
    labels = np.concatenate([sets.train.y, sets.valid.y])
    rows = np.flatnonzero(np.isin(labels, GROUPS))
    tested = np.flatnonzero(np.isin(sets.test.y, GROUPS))
    seen, labels = seen[rows], labels[rows] == GROUPS[0]
    terms = np.flatnonzero(np.bincount(seen.indices, minlength=seen.shape[1]) >= SEEN)
    seen = seen[:, terms]
    order = np.random.default_rng([seed, 9]).permutation(len(rows))
    train, valid = np.sort(order[: len(rows) // 2]), np.sort(order[len(rows) // 2 :])
    scale: Any = TfidfTransformer(sublinear_tf=True).fit(seen[train])
    seen, test = scale.transform(seen), scale.transform(sets.test.x[tested][:, terms])
    room = int(PADDED * seen.nnz)
    halves = {"train": train, "valid": valid}
    batches = {k: _single(_padded(seen[r], room), labels[r]) for k, r in halves.items()}
    return _task(
        name,
        batches["train"],
        batches["valid"],
        _single(_padded(seen, seen.nnz), labels),
        _single(_padded(test, test.nnz), sets.test.y[tested] == GROUPS[0]),
        1,
        {"l1": ()},
        (seen.astype(np.float64), labels, [(train, valid)]),
    )
