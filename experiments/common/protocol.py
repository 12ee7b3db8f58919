"""The protocol of all experiments: settings are found on some seeds and judged on others.

1. Whatever is set by hand or by search is set on seeds of at least `FIRST_TUNING`; reported are
   seeds 0, 1, ...
2. Along a run every method is taken at its best point by validation, tuned or not.
3. The test part is read once, for that point. No setting is chosen by it.
4. A setting that shall be of use to others is retrained from scratch on seeds it was not found on.

`tune_and_judge` holds to it by construction: what trains and what validates never see the test
part, and what tests is called for the winner alone, on seeds that took no part in the choice.

Cooper et al. 2021 (Hyperparameter Optimization Is Deceiving Us, and How to Stop It); Bouthillier et
al. 2021 (Accounting for Variance in Machine Learning Benchmarks).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

FIRST_TUNING = 100


class Outcome(NamedTuple):
    """What was chosen, and how it looks from three sides.

    `winner` is the index of the setting with the least mean validation loss over the tuning seeds;
    `validation` that mean, a minimum over settings and so too low; `same_seed_test` and
    `other_seed_test` the test losses on the tuning seeds, and on the judging seeds after
    training from scratch.
    """

    winner: int
    validation: float
    same_seed_test: list[float]
    other_seed_test: list[float]


def tuning_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds, if settings may be chosen on them; else `ValueError`."""
    wrong = [seed for seed in seeds if seed < FIRST_TUNING]
    if wrong or not seeds:
        raise ValueError(
            f"settings are chosen on seeds of at least {FIRST_TUNING}, got {list(seeds)}: smaller "
            "ones are reported"
        )
    return tuple(seeds)


def best_so_far(measured: Any, by: str = "validation_loss") -> dict[str, np.ndarray]:
    """Of a run, shape ``(points,)``, or parallel ones: all measurements at the best point so far.

    The best in validation loss: rule 2, for methods that are measured equally often.
    """
    losses = np.asarray(measured[by])
    lowest = np.minimum.accumulate(losses, axis=-1)
    points = np.arange(losses.shape[-1])
    at = np.maximum.accumulate(np.where(losses == lowest, points, 0), axis=-1)
    return {
        name: np.take_along_axis(np.asarray(value), at, axis=-1) for name, value in measured.items()
    }


def tune_and_judge(
    settings: Sequence[Any],
    train: Callable[[Any, int], Any],
    validate: Callable[[Any, int], float],
    test: Callable[[Any, int], float],
    *,
    tuning: Sequence[int],
    judging: Sequence[int],
) -> Outcome:
    """Chooses a setting by validation on the tuning seeds; retrains and tests it on the others.

    Arguments:
        settings: what is chosen among.
        train: a setting and a seed to a trained model.
        validate, test: a model and the seed of its data to a loss.
        tuning, judging: seeds; no seed may be in both.
    """
    tuning = tuning_seeds(tuning)
    if not judging or max(judging) >= FIRST_TUNING:
        raise ValueError(
            f"what was found is judged on seeds below {FIRST_TUNING}, got {list(judging)}"
        )
    models = [[train(setting, seed) for seed in tuning] for setting in settings]
    losses = [
        float(np.mean([validate(model, seed) for model, seed in zip(row, tuning, strict=True)]))
        for row in models
    ]
    finite = np.where(np.isfinite(losses), losses, np.inf)
    winner = int(np.argmin(finite))
    if not np.isfinite(finite[winner]):
        raise ValueError(f"none of the {len(settings)} settings has a finite validation loss")
    same = [test(model, seed) for model, seed in zip(models[winner], tuning, strict=True)]
    other = [test(train(settings[winner], seed), seed) for seed in judging]
    return Outcome(winner, losses[winner], same, other)
