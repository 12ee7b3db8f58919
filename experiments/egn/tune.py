"""Which settings train best, on a seed that no result uses: `python -m experiments.egn.tune`."""

import itertools
import sys
from typing import Any

from experiments.egn import config, run

SEED = 100
GRIDS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{"learning_rate": r} for r in (0.1, 0.3, 1.0)],
    "momentum": [{"learning_rate": r} for r in (0.03, 0.1, 0.3)],
    "adam": [{"learning_rate": r} for r in (0.003, 0.01, 0.03)],
    "egn": [
        {"learning_rate": r, "damping": d} for r, d in itertools.product((0.3, 1.0), (0.03, 0.3))
    ],
}
GRIDS["sgn"] = GRIDS["egn"]


def main(methods: list[str]) -> None:
    """Prints the losses of every setting, by optimizer and task."""
    settings = config.cpu()
    for task in settings.tasks:
        for method in methods:
            for chosen in GRIDS[method]:
                losses, told = run.trained(method, task, settings, SEED, chosen)
                each = len(losses) // task.epochs[method]
                reached = run.epochs_to(settings.target, losses, each)
                row = {**chosen, **{k: round(v, 5) for k, v in told.items()}}
                sys.stdout.write(f"{task.name} {method} {row} {reached:.2f}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:] or list(GRIDS))
