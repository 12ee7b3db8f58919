"""Black-box baselines: random search and TPE (Optuna) at a fixed budget of inner gradients.

Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, 2012; Bergstra, Bardenet,
Bengio and Kegl, Algorithms for Hyper-Parameter Optimization, 2011 (TPE).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SAMPLERS = ("random", "tpe")


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
    startup: int = 10,
    log: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Minimises `objective(hparams)` with `floor(budget / cost)` trials by ask and tell.

    Arguments:
        objective: the setting, `{name: value}`, to the value to minimise.
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


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the smallest finite value."""
    finite = [trial for trial in trials if math.isfinite(trial.value)]
    if not finite:
        raise ValueError(f"none of the {len(trials)} trials gave a finite value")
    return min(finite, key=lambda trial: trial.value)
