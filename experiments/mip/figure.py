"""The pictures of `mip`, from saved records."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record
from experiments.mip.run import best_rate, curves, final_losses

COLOURS = {
    "plain": draw.BLACK,
    "he": draw.PURPLE,
    "encoding": draw.SKY,
    "residual": draw.GOLD,
    "mip": draw.BLUE,
}
NAMES = {
    "plain": "plain",
    "he": "plain, He-scaled",
    "encoding": "encoding only",
    "residual": "residual only",
    "mip": "MIP",
}
TASKS = {
    "deep": "three hidden layers",
    "shallow": "one hidden layer",
    "linear": "linear, ten images",
    "conv": "convolutional",
}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam"}


def figures(out: Path) -> list[Path]:
    """Training at the best rates, the final loss by rate, and sizes before training."""
    records = record.read(out)
    return [
        _training(records, out / "figures" / "training.png"),
        _rates(records, out / "figures" / "rates.png"),
        _sizes(records, out / "figures" / "sizes.png"),
    ]


def _panels(records: list[record.Record]) -> list[tuple[str, str, list[str]]]:
    """``(task, optimizer, variants)`` in the order of the panels, no variants for an empty one."""
    there = {r.method for r in records}
    return [
        (task, optimizer, [v for v in COLOURS if f"{task}_{v}_{optimizer}" in there])
        for task in TASKS
        for optimizer in OPTIMIZERS
        if any(method.startswith(f"{task}_") for method in there)
    ]


def _grid(path: Path, rows: int) -> Any:
    """A row of two panels for every task, one for each optimizer."""
    return draw.figure(path, rows=rows, columns=2, width=8.6, height=3.2 * rows)


def _training(records: list[record.Record], path: Path) -> Path:
    panels = _panels(records)
    with _grid(path, len(panels) // 2) as (_, axes):
        for panel, (task, optimizer, variants) in zip(np.ravel(axes), panels, strict=True):
            if not variants:
                panel.set_axis_off()
                continue
            for variant in variants:
                method = f"{task}_{variant}_{optimizer}"
                losses = curves(records, method)
                best = best_rate(losses)
                runs = losses[:, best]
                rates = next(r for r in records if r.method == method).metrics["rates"]
                part = np.linspace(0, 100, runs.shape[1] + 1)[1:]
                panel.plot(
                    part,
                    np.median(runs, 0),
                    color=COLOURS[variant],
                    label=f"{NAMES[variant]}, rate {rates[best]:g}",
                )
                panel.fill_between(
                    part, runs.min(0), runs.max(0), color=COLOURS[variant], alpha=0.15, linewidth=0
                )
            panel.set(
                title=f"{TASKS[task]}, {OPTIMIZERS[optimizer]}",
                xlabel="training steps (% of all)",
                yscale="log",
            )
            panel.legend(fontsize="small", frameon=True, framealpha=0.85)
        for panel in np.reshape(axes, (-1, 2))[:, 0]:
            panel.set_ylabel("training loss, mean over inputs")
    return path


def _rates(records: list[record.Record], path: Path) -> Path:
    panels = _panels(records)
    with _grid(path, len(panels) // 2) as (_, axes):
        for panel, (task, optimizer, variants) in zip(np.ravel(axes), panels, strict=True):
            if not variants:
                panel.set_axis_off()
                continue
            ends = [r for r in records if r.method == f"{task}_plain_{optimizer}"]
            zero = max(ends, key=lambda r: r.step).metrics["zero_loss"]
            top = 1.3 * zero
            for variant in variants:
                method = f"{task}_{variant}_{optimizer}"
                final = final_losses(curves(records, method))
                rates = next(r for r in records if r.method == method).metrics["rates"]
                shown = np.minimum(final, top)  # a run that blew up is drawn at the top
                panel.plot(
                    rates, np.median(shown, 0), "o-", color=COLOURS[variant], label=NAMES[variant]
                )
                panel.fill_between(
                    rates,
                    shown.min(0),
                    shown.max(0),
                    color=COLOURS[variant],
                    alpha=0.15,
                    linewidth=0,
                )
            panel.axhline(zero, color=draw.GREY, linestyle="--", label="weights of zero")
            panel.set(
                title=f"{TASKS[task]}, {OPTIMIZERS[optimizer]}",
                xlabel="learning rate",
                xscale="log",
                yscale="log",
            )
        for panel in np.reshape(axes, (-1, 2))[:, 0]:
            panel.set_ylabel("final training loss")
        np.ravel(axes)[0].legend()
    return path


def _sizes(records: list[record.Record], path: Path) -> Path:
    """Norm of the predicted weights (without base weights) over the input, at first."""
    last = {r.method: r for r in records if "predicted_norms" in r.metrics and r.seed == 0}
    task = "deep" if any(m.startswith("deep") for m in last) else "linear"
    with draw.figure(path, width=5.5, height=3.6) as (_, axes):
        for variant in COLOURS:
            if (end := last.get(f"{task}_{variant}_sgd")) is not None:
                norms = end.metrics["predicted_norms"]
                g = np.linspace(0, 1, len(norms))
                axes.plot(g, norms, color=COLOURS[variant], label=NAMES[variant])
        axes.set(
            title="before training", xlabel="input g", ylabel="norm of predicted weights", ylim=0
        )
        axes.legend()
    return path
