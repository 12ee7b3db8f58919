"""The pictures of `stn_ridge`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {"delta_stn": "Delta-STN", "stn": "STN"}


def figures(out: Path) -> list[Path]:
    """Trajectories on the optimum, and the error of the learnt response."""
    records = record.read(out)
    return [
        _trajectories(records, out, out / "figures" / "trajectories.png"),
        _jacobian(records, out / "figures" / "jacobian.png"),
    ]


def _trajectories(records: list[record.Record], out: Path, path: Path) -> Path:
    """Log decay against cost for every start, and the exact validation loss beside it."""
    seed = min(r.seed for r in records)
    exact = record.load_arrays(out, f"exact_{seed}")
    with draw.figure(path, columns=3, width=12.0, height=4.0) as (_, axes):
        for panel, (method, name) in zip(axes, NAMES.items(), strict=False):
            chosen = [r for r in records if r.seed == seed and r.method == method]
            cost = [r.cost for r in chosen]
            panel.plot(cost, [r.metrics["lam"] for r in chosen], color=draw.colour(method))
            panel.axhline(
                chosen[0].metrics["optimum"], color=draw.BLACK, linestyle="--", label="exact"
            )
            panel.set(title=name, xlabel="cost (inner-gradient evaluations)", ylim=(-5.3, 2.3))
            panel.legend()
        axes[0].set_ylabel("log decay")
        axes[2].plot(exact["losses"], exact["lam"], color=draw.GREY)
        axes[2].axhline(chosen[0].metrics["optimum"], color=draw.BLACK, linestyle="--")
        axes[2].set(title="exact", xlabel="validation loss", ylim=(-5.3, 2.3))
    return path


def _jacobian(records: list[record.Record], path: Path) -> Path:
    """Relative error of the response against its closed form, over training at a fixed decay."""
    with draw.figure(path, width=6.5) as (_, axes):
        for method, name in NAMES.items():
            runs: dict[int, list[float]] = {}
            for r in records:
                if r.method == method:
                    runs.setdefault(r.seed, []).append(r.metrics["response_error"])
            errors = np.array(list(runs.values()))
            steps = np.linspace(0, 100, errors.shape[1] + 1)[1:]
            low, middle, high = errors.min(0), np.median(errors, 0), errors.max(0)
            axes.plot(steps, middle, color=draw.colour(method), label=name)
            axes.fill_between(steps, low, high, color=draw.colour(method), alpha=0.18, linewidth=0)
        axes.set(
            yscale="log",
            xlabel="training steps at equal rates (% of all)",
            ylabel="relative error of the response",
            title="log decay fixed at −4",
        )
        axes.legend()
    return path
