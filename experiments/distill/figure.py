"""The pictures of `distill`, from saved records and arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "digits": "digits"}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    sets = [name for name in SETS if any(r.method == f"{name}_learned_1" for r in records)]
    counts = sorted({int(r.method.rpartition("_")[2]) for r in records if "learned" in r.method})
    folder = out / "figures"
    files = [_accuracy(records, sets, counts, folder / "accuracy.png")]
    files += [_images(records, out, name, 1, folder / f"{name}_images.png") for name in sets]
    if len(counts) > 1:
        files.append(_images(records, out, sets[0], counts[-1], folder / f"{sets[0]}_more.png"))
    return files


def _accuracy(records: list[record.Record], sets: list[str], counts: list[int], path: Path) -> Path:
    """Test accuracy of a model trained on the images, against hypergradients."""
    with draw.figure(path, columns=len(sets), width=6.0 * len(sets), height=4.4) as (_, axes):
        for cell, name in zip(np.atleast_1d(axes), sets, strict=True):
            last = max(r.step for r in records if r.method == f"{name}_learned_1")
            for index, count in enumerate(counts):
                shade = draw.OTHERS[index]
                chosen = [r for r in records if r.method == f"{name}_learned_{count}"]
                steps = sorted({r.step for r in chosen})
                values = np.array(
                    [
                        [r.metrics["retrained_accuracy"] for r in chosen if r.step == k]
                        for k in steps
                    ]
                )
                cell.plot(
                    steps, np.median(values, 1), color=shade, label=f"{count} learned a class"
                )
                cell.fill_between(
                    steps, values.min(1), values.max(1), color=shade, alpha=0.18, linewidth=0
                )
                _level(
                    cell,
                    records,
                    f"{name}_real_{count}",
                    shade,
                    f"{count} real a class",
                    last,
                    "--",
                )
            _level(cell, records, f"{name}_means", draw.BLACK, "class means", last, ":")
            _level(cell, records, f"{name}_whole_set", draw.GREY, "all images", last, "-.")
            cell.set(xlabel="hypergradients", title=SETS[name])
        np.atleast_1d(axes)[0].set_ylabel("test accuracy of a linear model trained on them")
        np.atleast_1d(axes)[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return path


def _level(
    axes: Any,
    records: list[record.Record],
    method: str,
    shade: str,
    text: str,
    last: int,
    line: str,
) -> None:
    values = [r.metrics["retrained_accuracy"] for r in records if r.method == method]
    axes.plot([1, last], [np.median(values)] * 2, color=shade, linestyle=line, label=text)


def _images(records: list[record.Record], out: Path, name: str, count: int, path: Path) -> Path:
    """The learned images: a column for a class, zero in white."""
    method = f"{name}_learned_{count}"
    seed = min(r.seed for r in records if r.method == method)
    images = record.load_arrays(out, f"{method}_{seed}")["images"]
    accuracy = record.final(r for r in records if r.method == method)[method, seed].metrics
    limit = float(np.quantile(np.abs(images), 0.995))
    size = {"rows": count, "columns": 10, "width": 12.0, "height": 1.25 * count + 0.55}
    with draw.figure(path, **size) as (drawn, axes):
        for index, cell in enumerate(np.ravel(axes)):
            cell.imshow(images[index], cmap="RdBu_r", vmin=-limit, vmax=limit)
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            for side in cell.spines.values():
                side.set_visible(False)
            if index < 10:
                cell.set_title(str(index), loc="center")
        drawn.suptitle(
            f"{SETS[name]}: a linear model trained on these {len(images)} images alone is right on "
            f"{100 * accuracy['retrained_accuracy']:.1f} % of the test set"
        )
    return path
