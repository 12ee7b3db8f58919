"""The pictures of `augment`, from saved records and arrays."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

SETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG)", "digits": "digits"}
NAMES = {
    "none": ("none", draw.GREY),
    "by_hand": ("made by hand", draw.GREEN),
    "untrained": ("U-Net as it starts", draw.GOLD),
    "learned": ("learned", draw.BLUE),
    "replayed": ("learned,\nnew classifier", draw.SKY),
    "both_parts": ("none, trained on\nvalidation too", draw.BLACK),
}
NOISY = {"noisy_none": ("all weigh 1", draw.GREY), "noisy_learned": ("learned", draw.BLUE)}


def figures(out: Path) -> list[Path]:
    """Draws everything the records of ``out`` allow, and returns the files."""
    records = record.read(out)
    sets = [name for name in SETS if any(r.method == f"{name}_learned" for r in records)]
    folder = out / "figures"
    files = [_accuracy(records, sets, folder / "accuracy.png")]
    files += [_images(records, out, name, folder / f"{name}_images.png") for name in sets]
    noisy = [name for name in sets if any(r.method == f"{name}_noisy_learned" for r in records)]
    if noisy:
        files.append(_weights(records, out, noisy, folder / "weights.png"))
    return files


def _bars(
    axes: Any, records: list[record.Record], name: str, methods: dict[str, tuple[str, str]]
) -> None:
    """Mean test accuracy at the end, with a dot for every seed."""
    ends = record.final(records)
    rows = [m for m in methods if any(key[0] == f"{name}_{m}" for key in ends)]
    lowest = 1.0
    for place, method in enumerate(rows):
        values = [
            100 * end.metrics["test_accuracy"]
            for (full, _), end in ends.items()
            if full == f"{name}_{method}"
        ]
        text, shade = methods[method]
        axes.barh(place, np.mean(values), color=shade, alpha=0.75, height=0.6)
        axes.plot(values, [place] * len(values), "o", color="white", mec=draw.BLACK, ms=5)
        axes.annotate(
            f"{np.mean(values):.1f}",
            (max(values), place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
        )
        lowest = min(lowest, min(values) / 100)
    axes.set_yticks(range(len(rows)), [methods[m][0] for m in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    spread = [
        100 * e.metrics["test_accuracy"]
        for (f, _), e in ends.items()
        if f in [f"{name}_{m}" for m in rows]
    ]
    margin = max(1.0, 0.35 * (max(spread) - min(spread)))
    axes.set_xlim(min(spread) - margin, max(spread) + margin)


def _accuracy(records: list[record.Record], sets: list[str], path: Path) -> Path:
    """Test accuracy at the end (bars), and test loss along training."""
    size = {"rows": 2, "columns": len(sets), "width": 6.8 * len(sets) + 1.5, "height": 7.4}
    with draw.figure(path, **size) as (_, axes):
        axes = np.reshape(axes, (2, len(sets)))
        for column, name in enumerate(sets):
            top, bottom = axes[:, column]
            _bars(top, records, name, NAMES)
            top.set(title=SETS[name], xlabel="test accuracy, % (dots: single seeds)")
            for method, (text, shade) in NAMES.items():
                chosen = [r for r in records if r.method == f"{name}_{method}"]
                steps = sorted({r.step for r in chosen})
                if not steps:
                    continue
                values = np.array(
                    [[r.metrics["test_loss"] for r in chosen if r.step == k] for k in steps]
                )
                bottom.plot(steps, values.mean(1), color=shade, label=text)
                bottom.fill_between(
                    steps, values.min(1), values.max(1), color=shade, alpha=0.18, linewidth=0
                )
            bottom.set(xlabel="training step", ylabel="test loss (nats)", ylim=(0, None))
        axes[1, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return path


def _images(records: list[record.Record], out: Path, name: str, path: Path) -> Path:
    """Originals above four draws of the learned augmentation, and one of the hand-made."""
    seed = min(r.seed for r in records if r.method == f"{name}_learned")
    saved = record.load_arrays(out, f"{name}_learned_{seed}")
    rows = [saved["originals"], *saved["augmented"], saved["by_hand"]]
    titles = ["original", *(f"learned {i + 1}" for i in range(4)), "made by hand"]
    count = len(rows[0])
    size = {"rows": len(rows), "columns": count, "width": 1.2 * count, "height": 7.6}
    with draw.figure(path, **size) as (drawn, axes):
        for row, (images, title) in enumerate(zip(rows, titles, strict=True)):
            for image, cell in zip(images, axes[row], strict=True):
                cell.imshow(np.clip(np.squeeze(image), 0, 1), cmap="gray", vmin=0, vmax=1)
                cell.set(xticks=[], yticks=[])
                cell.grid(False)
            axes[row, 0].set_ylabel(title)
        drawn.suptitle(f"{SETS[name]}: training images, and what the learned U-Net makes of them")
    return path


def _weights(records: list[record.Record], out: Path, sets: list[str], path: Path) -> Path:
    """Test accuracy with wrong labels, and the learned weight of an example by its loss."""
    size = {"rows": 2, "columns": len(sets), "width": 6.6 * len(sets), "height": 5.8}
    with draw.figure(path, **size) as (drawn, axes):
        axes = np.reshape(axes, (2, len(sets)))
        for column, name in enumerate(sets):
            top, bottom = axes[:, column]
            _bars(top, records, name, NOISY)
            seeds = sorted({r.seed for r in records if r.method == f"{name}_noisy_learned"})
            right, wrong = [], []
            for seed in seeds:
                saved = record.load_arrays(out, f"{name}_noisy_learned_{seed}")
                right.append(saved["weights"][~saved["wrong"]])
                wrong.append(saved["weights"][saved["wrong"]])
            share = np.mean(np.concatenate([saved["wrong"]]))
            top.set(
                title=f"{SETS[name]}, {100 * share:.0f} % of the labels wrong: test accuracy",
                xlabel="% (dots: single seeds)",
            )
            top_weight = max(np.max(np.concatenate(right)), np.max(np.concatenate(wrong)))
            bins = np.linspace(0, top_weight, 31).tolist()
            for values, shade, text in (
                (right, draw.GREEN, "right label"),
                (wrong, draw.ORANGE, "wrong label"),
            ):
                bottom.hist(np.concatenate(values), bins, color=shade, alpha=0.6, label=text)
            bottom.set(xlabel="learned weight of a training example", ylabel="examples")
            bottom.legend()
    return path
