"""Black-box baselines: random search and TPE (Optuna) at a fixed budget of inner gradients.

Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, 2012; Bergstra, Bardenet,
Bengio and Kegl, Algorithms for Hyper-Parameter Optimization, 2011 (TPE).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.record import Records, read

SAMPLERS = ("random", "tpe")
# Optuna draws ten at random before it models: more than half of what the budgets here pay for.
STARTUP = 4


class Trial(NamedTuple):
    """One evaluated setting: what was tried, what it gave, the cost so far, the best so far."""

    number: int
    hparams: dict[str, Any]
    value: float
    cost: float
    best: float


def search(
    objective: Callable[[dict[str, Any]], float],
    space: Mapping[str, Any],
    *,
    budget: float,
    cost: float,
    sampler: str,
    seed: int,
    done: Sequence[float] = (),
    startup: int = STARTUP,
    log: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Minimizes `objective(hparams)` with `floor(budget / cost)` trials by ask and tell.

    Arguments:
        objective: the setting, `{name: value}`, to the value to minimize.
        space: name to `(low, high)`, uniform, or to an `optuna.distributions` object.
        budget: inner-gradient evaluations to spend in all.
        cost: inner-gradient evaluations of one trial.
        sampler: "random" or "tpe".
        seed: seed of the sampler; nothing else is random here.
        done: values of trials already evaluated in an interrupted search of the same seed; they
            are told again without being evaluated, after which the search goes on as if it had
            never stopped.
        startup: random trials before TPE begins to model.
        log: called with every newly evaluated trial.

    Returns:
        All trials in order. A non-finite value stays in the log and counts as a failed trial: it
        is never the best one.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import TrialState

    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not cost > 0 or budget < cost:
        raise ValueError(f"a budget of {budget:g} does not pay for one trial of cost {cost:g}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        name: choice if isinstance(choice, BaseDistribution) else FloatDistribution(*choice)
        for name, choice in space.items()
    }
    samplers = optuna.samplers
    study = optuna.create_study(
        sampler=samplers.RandomSampler(seed)
        if sampler == "random"
        else samplers.TPESampler(seed=seed, n_startup_trials=startup)
    )
    trials: list[Trial] = []
    best = math.inf
    for number in range(int(budget // cost)):
        asked = study.ask(distributions)
        replayed = number < len(done)
        value = float(done[number] if replayed else objective(dict(asked.params)))
        if math.isfinite(value):
            study.tell(asked, value)
            best = min(best, value)
        else:
            study.tell(asked, state=TrialState.FAIL)
        trials.append(Trial(number, dict(asked.params), value, (number + 1) * cost, best))
        if log is not None and not replayed:
            log(trials[-1])
    return trials


class Tried(NamedTuple):
    """What an objective of `recorded` gives: the loss to minimize, and what else is measured.

    `measure` is called only if the trial is the best so far: the test part is read for winners.
    """

    value: float
    measure: Callable[[], Mapping[str, Any]]


def recorded(
    objective: Callable[[dict[str, Any], int], Tried],
    space: Mapping[str, Any],
    *,
    records: Records,
    method: str,
    trials: int,
    cost: float,
    sampler: str,
    startup: int = STARTUP,
    prefix: str = "",
) -> None:
    """A search whose records tell the best trial so far; one that was interrupted goes on.

    Each trial is one record of `method`: what was measured of the best, its setting (names with
    `prefix`), and the loss of the trial itself, `trial_loss`. The objective is told the number of
    the trial. The arguments are otherwise those of `search`.
    """
    before = read(records.out, seed=records.seed, method=method)
    kept: dict[str, Any] = dict(before[-1].metrics) if before else {}
    lowest = min((r.metrics["trial_loss"] for r in before), default=math.inf)
    latest: list[Tried] = []

    def value(setting: dict[str, Any]) -> float:
        latest.append(objective(setting, len(before) + len(latest)))
        return latest[-1].value

    def log(trial: Trial) -> None:
        nonlocal kept, lowest
        if trial.value < lowest:
            lowest = trial.value
            setting = {f"{prefix}{name}": float(x) for name, x in trial.hparams.items()}
            kept = {**latest[-1].measure(), **setting}
        records.append(method, trial.number, trial.cost, **{**kept, "trial_loss": trial.value})

    search(
        value,
        space,
        budget=trials * cost,
        cost=cost,
        sampler=sampler,
        seed=records.seed,
        done=[r.metrics["trial_loss"] for r in before],
        startup=startup,
        log=log,
    )


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the smallest finite value."""
    finite = [trial for trial in trials if math.isfinite(trial.value)]
    if not finite:
        raise ValueError(f"none of the {len(trials)} trials gave a finite value")
    return min(finite, key=lambda trial: trial.value)
