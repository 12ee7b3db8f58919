"""The pictures of `hypernet`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

DATA = {"digits": "8×8 digits", "mnist": "MNIST"}
PART_TWO = {
    "random_per_weight": ("random search, one decay per weight", draw.GREY),
    "random_shared": ("random search, one decay", draw.BLACK),
    "tpe_shared": ("TPE, one decay", draw.BROWN),
    "local_shared": ("local hypernetwork, one decay", draw.SKY),
    "local_per_weight": ("local hypernetwork, one decay per weight", draw.BLUE),
}


def figures(out: Path) -> list[Path]:
    """Learnt and exact validation curves, the path of the local one, and the second part."""
    records = record.read(out)
    used = [name for name in DATA if any(r.method == f"{name}_local" for r in records)]
    return [
        _curves(out, records, used, out / "figures" / "curves.png"),
        _paths(records, used, out / "figures" / "found.png"),
        _decays(records, out / "figures" / "decays.png"),
    ]


def _curves(out: Path, records: list[record.Record], used: list[str], path: Path) -> Path:
    """Validation loss over the log decay: exact, global and local, of the first seed."""
    seed = min(r.seed for r in records)
    columns = len(used)
    with draw.figure(path, columns=columns, width=5.6 * columns, height=4.2) as (_, axes):
        for panel, name in zip(np.ravel(axes), used, strict=True):
            kept = record.load_arrays(out, f"{name}_{seed}")
            lam, exact = kept["lam"], kept["exact"]
            ends = record.final(r for r in records if r.seed == seed)
            panel.plot(lam, exact, color=draw.BLACK, linewidth=3.5, alpha=0.35, label="exact")
            for method, shade, label in (
                ("global", draw.BLUE, "global hypernetwork"),
                ("local", draw.ORANGE, "local, a straight line"),
            ):
                panel.plot(lam, kept[method][-1], color=shade, label=label)
                found = ends[f"{name}_{method}", seed].metrics["found"]
                height = np.interp(found, lam, kept[method][-1])
                panel.plot(found, height, "o", color=shade, markersize=8)
            best = ends[f"{name}_local", seed].metrics["optimum"]
            panel.axvline(best, color=draw.BLACK, linestyle="--", linewidth=1)
            room = exact.max() - exact.min()
            panel.set(
                title=f"{DATA[name]}: both find the minimum of the exact curve",
                xlabel="log decay",
                ylim=(exact.min() - 0.15 * room, exact.max() + 0.3 * room),
            )
        np.ravel(axes)[0].set_ylabel("validation loss")
        np.ravel(axes)[0].legend(loc="upper left")
    return path


def _paths(records: list[record.Record], used: list[str], path: Path) -> Path:
    """Distance of the hyperparameter found from the exact optimum, over cost, all seeds."""
    columns = len(used)
    with draw.figure(path, columns=columns, width=5.6 * columns, height=3.8) as (_, axes):
        for panel, name in zip(np.ravel(axes), used, strict=True):
            for method, shade in (("global", draw.BLUE), ("local", draw.ORANGE)):
                cost, values = draw.curves(records, f"{name}_{method}", "error")
                panel.plot(cost, np.median(values, 0), color=shade, label=method)
                panel.fill_between(
                    cost, values.min(0), values.max(0), color=shade, alpha=0.15, linewidth=0
                )
            panel.axhline(0.3, color=draw.GREY, linestyle="--", label="bound at the end")
            panel.set(
                title=f"{DATA[name]}: distance from the optimum found exactly",
                xlabel="cost (inner-gradient evaluations)",
                yscale="log",
            )
            panel.locator_params(axis="x", nbins=5)
        np.ravel(axes)[0].set_ylabel("|log decay found − exact optimum|")
        np.ravel(axes)[0].legend()
    return path


def _decays(records: list[record.Record], path: Path) -> Path:
    """Validation and test loss over cost: of the network, or of a search's best trial so far."""
    titles = {
        "validation_loss": "Validation: one shared decay beats one per weight",
        "test_loss": "Test: the same order",
    }
    with draw.figure(path, columns=2, width=11.5, height=4.2) as (_, axes):
        tops = []
        for panel, (metric, title) in zip(axes, titles.items(), strict=True):
            for method, (label, shade) in PART_TWO.items():
                cost, values = draw.curves(records, method, metric)
                middle = np.median(values, 0)
                # TPE and random search find nearly the same decay: the one shows through the other.
                style = {"linestyle": (0, (3, 3)), "zorder": 3} if method == "tpe_shared" else {}
                panel.plot(cost, middle, color=shade, label=label, drawstyle="steps-post", **style)
                panel.fill_between(
                    cost,
                    values.min(0),
                    values.max(0),
                    color=shade,
                    alpha=0.15,
                    linewidth=0,
                    step="post",
                )
                tops.append(middle[len(middle) // 4])
            panel.set(
                title=title,
                xlabel="cost (inner-gradient evaluations)",
                ylabel=metric.replace("_", " "),
            )
            panel.locator_params(axis="x", nbins=5)
        for panel in axes:  # the first steps of training are not what is compared
            panel.set_ylim(top=1.15 * max(tops))
        axes[0].legend(fontsize=9)
    return path
