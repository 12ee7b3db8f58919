"""The searches of scikit-learn: LassoCV, ElasticNetCV, LogisticRegressionCV."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.sparse.config import Config
from experiments.sparse.tasks import Task, hparams_at
from experiments.sparse.tune import Found, axis

RATIOS = (0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)  # of L1, as its documentation proposes


def rival(task: Task) -> Callable[[Task, Config], Found] | None:
    """What scikit-learn offers for a task."""
    return {"lasso": _lasso, "elastic_net": _elastic_net, "logistic": _logistic}.get(task.name)


def _timed(model: Any, task: Task, passes: Callable[[Any], float]) -> tuple[Any, float, float]:
    x, y, _ = task.rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paths that did not converge to its tolerance
        clock = time.perf_counter()
        model.fit(x, y)
        seconds = time.perf_counter() - clock
        return model, seconds, passes(model)


def _found(task: Task, hparams: Any, seconds: float, passes: float, evaluations: int) -> Found:
    start: Any = np.zeros(task.shape, np.float32)
    return Found(hparams, math.nan, start, passes, seconds, evaluations)


def _passes(task: Task, config: Config, ratio: float, alphas: np.ndarray) -> float:
    """Coordinate-descent passes over the data of one path, mean over folds."""
    from sklearn.linear_model import enet_path

    x, y, folds = task.rows
    told = [
        enet_path(x[f], y[f], l1_ratio=ratio, alphas=alphas, return_n_iter=True)[-1]
        for f, _ in folds
    ]
    return float(np.sum(np.mean(told, 0)))


def _alphas(task: Task, config: Config) -> np.ndarray:
    return np.exp(task.top + axis(config, config.points))


def _lasso(task: Task, config: Config) -> Found:
    from sklearn.linear_model import LassoCV

    alphas = _alphas(task, config)
    model = LassoCV(alphas=alphas, cv=task.rows[2], fit_intercept=False, n_jobs=1)
    model, seconds, passes = _timed(model, task, lambda _: _passes(task, config, 1.0, alphas))
    hparams = hparams_at(task, {"l1": math.log(model.alpha_) - task.top})
    return _found(task, hparams, seconds, passes, len(alphas))


def _elastic_net(task: Task, config: Config) -> Found:
    from sklearn.linear_model import ElasticNetCV

    alphas = _alphas(task, config)
    model = ElasticNetCV(
        alphas=alphas, l1_ratio=list(RATIOS), cv=task.rows[2], fit_intercept=False, n_jobs=1
    )
    model, seconds, passes = _timed(
        model, task, lambda _: sum(_passes(task, config, r, alphas) for r in RATIOS)
    )
    alpha, ratio = model.alpha_, model.l1_ratio_
    l2 = math.log(alpha * (1 - ratio)) if ratio < 1 else task.top + math.log(1e-9)
    hparams = hparams_at(task, {"l1": math.log(alpha * ratio) - task.top, "l2": l2 - task.top})
    return _found(task, hparams, seconds, passes, len(alphas) * len(RATIOS))


def _logistic(task: Task, config: Config) -> Found:
    """By liblinear, whose iterations are not passes over the data: its cost is not told."""
    from sklearn.linear_model import LogisticRegressionCV

    alphas, (train, _) = _alphas(task, config), task.rows[2][0]
    model = LogisticRegressionCV(
        Cs=1 / (len(train) * alphas), cv=task.rows[2], solver="liblinear", l1_ratios=(1,),
        penalty="l1", fit_intercept=False, scoring="neg_log_loss", refit=False,
    )  # fmt: skip
    model, seconds, passes = _timed(model, task, lambda _: math.nan)
    c = float(np.ravel(model.C_)[0])
    hparams = hparams_at(task, {"l1": -math.log(c * len(train)) - task.top})
    return _found(task, hparams, seconds, passes, len(alphas))
