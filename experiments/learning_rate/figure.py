"""The pictures of `learning_rate`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

STYLES = {
    "full": ("whole run", draw.BLUE, "-"),
    "greedy_1": ("greedy, 1 step", draw.ORANGE, "-"),
    "greedy_10": ("greedy, 10 steps", draw.GOLD, "-"),
    "greedy": ("greedy, 1 step", draw.ORANGE, "-"),
    "full_validation": ("whole run, on validation", draw.SKY, "-"),
    "constant": ("constant, searched", draw.GREY, "--"),
    "cosine": ("cosine, searched", draw.BLACK, "--"),
    "linear": ("linear, searched", draw.NAVY, "--"),
    "d_adaptation": ("D-Adaptation", draw.PURPLE, ":"),
    "prodigy": ("Prodigy", draw.GREEN, ":"),
    "schedule_free": ("schedule-free", draw.OLIVE, ":"),
    "mechanic": ("Mechanic", draw.BROWN, ":"),
}
TITLES = {"quadratic": "noisy quadratic, exact", "mlp": "MLP, Fashion-MNIST", "cnn": "CNN"}


def figures(out: Path) -> list[Path]:
    """Schedules above and losses below for each problem; layers apart in a second picture."""
    finished = [r for r in record.final(record.read(out)).values() if "final_loss" in r.metrics]
    problems = list(dict.fromkeys(r.method.partition("_")[0] for r in finished))
    paths = [out / "figures" / "schedules.png", out / "figures" / "layers.png"]
    with draw.figure(
        paths[0], rows=2, columns=len(problems), width=4.4 * len(problems), height=7
    ) as (
        _,
        axes,
    ):
        for column, problem in zip(axes.T, problems, strict=True):
            _schedules(column[0], finished, problem)
            _curves(column[1], finished, problem)
    _layers(finished, paths[1])
    return paths


def _of(finished: list[record.Record], problem: str) -> dict[str, list[record.Record]]:
    """Records of all seeds of each method of a problem."""
    found: dict[str, list[record.Record]] = {}
    for r in finished:
        name, _, method = r.method.partition("_")
        if name == problem:
            found.setdefault(method, []).append(r)
    return {method: found[method] for method in STYLES if method in found}


def _schedules(axes, finished: list[record.Record], problem: str) -> None:
    for method, records in _of(finished, problem).items():
        if "rates" not in records[0].metrics:  # one that chooses its own
            continue
        rates = np.stack([np.asarray(r.metrics["rates"]) for r in records])
        if rates.ndim == 3:  # seeds, layers, windows: the geometric mean over layers
            rates = np.exp(np.log(rates).mean(1))
        label, colour, line = STYLES[method]
        edges = np.linspace(0, 1, rates.shape[1] + 1)
        axes.stairs(
            np.median(rates, 0),
            edges,
            color=colour,
            linestyle=line,
            label=label,
            lw=2.2,
            baseline=None,
        )
    axes.set(yscale="log", ylabel="learning rate", xlabel="part of training")
    axes.set_title(TITLES[problem])


def _curves(axes, finished: list[record.Record], problem: str) -> None:
    for method, records in _of(finished, problem).items():
        curves = np.stack([np.asarray(r.metrics["curve"]) for r in records])
        label, colour, line = STYLES[method]
        time = (np.arange(curves.shape[1]) + 0.5) / curves.shape[1]
        low, middle, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
        axes.plot(time, middle, color=colour, linestyle=line, label=label)
        axes.fill_between(time, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(yscale="log", ylabel="loss of a fresh run", xlabel="part of training")
    if len(axes.get_lines()) > 6:  # beside the curves, which leave no room
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    else:
        axes.legend(loc="upper right", fontsize=9)


def _layers(finished: list[record.Record], path: Path) -> None:
    """Rates and momenta of the three layers, learned through whole runs."""
    models = [p for p in ("mlp", "cnn") if _of(finished, p)]
    with draw.figure(path, rows=len(models), columns=2, width=9.0, height=3.4 * len(models)) as (
        _,
        axes,
    ):
        for row, model in zip(np.reshape(axes, (-1, 2)), models, strict=True):
            records = _of(finished, model)["full"]
            for axis, metric in zip(row, ("rates", "momenta"), strict=True):
                values = np.median([r.metrics[metric] for r in records], 0)
                edges = np.linspace(0, 1, values.shape[1] + 1)
                for i, layer in enumerate(values):
                    axis.stairs(
                        layer,
                        edges,
                        color=draw.OTHERS[i],
                        label=f"layer {i + 1}",
                        lw=2,
                        baseline=None,
                    )
                axis.set(
                    xlabel="part of training",
                    ylabel={"rates": "learning rate"}.get(metric, "momentum"),
                )
                axis.set_title(f"{TITLES[model]}, learned through whole runs")
            row[0].legend()
