"""Pictures of large hyperparameters: pixels, layers, and examples with their weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bilevel.plot.canvas import BLUE, GREY, ORANGE, canvas
from bilevel.plot.records import arrays

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pixel_map(
    values: Any, shape: tuple[int, int] | None = None, *, label: str = "log weight decay"
) -> "Figure":
    """One hyperparameter per input pixel, as an image.

    The colour is the difference from the median pixel, which the bar names: blue pixels are
    regularized less than the median, red ones more.

    Args:
      values: an array whose *first* axis, or first two, are pixels; other axes (units that read
        the pixel) are averaged.
      shape: height and width, where the first axis is a flattened image.
      label: what a value is, for the colour bar.

    Returns:
      A matplotlib figure.

    Raises ``ValueError`` if ``shape`` does not fit.
    """
    array = np.asarray(values, float)
    if shape is not None:
        if np.prod(shape) != array.shape[0]:
            raise ValueError(
                f"`shape` {shape} has {np.prod(shape)} pixels, but `values` has {array.shape[0]} "
                "along its first axis: pass the height and width of the flattened image."
            )
        array = array.reshape(*shape, -1)
    if array.ndim < 2:
        raise ValueError("`values` is flat: pass `shape=(height, width)`.")
    image = array.reshape(*array.shape[:2], -1).mean(-1)
    middle = float(np.median(image))
    reach = float(np.max(np.abs(image - middle))) or 1.0
    with canvas("pixel_map", width=4.6, height=3.8) as (figure, grid):
        axes = grid[0, 0]
        drawn = axes.imshow(image - middle, cmap="RdBu_r", vmin=-reach, vmax=reach)
        title = f"{label[:1].upper()}{label[1:]} per pixel (red: above the median)"
        axes.set(xticks=[], yticks=[], title=title)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.85)
        bar.set_label(f"{label} minus its median ({middle:.3g})")
    return figure


def layer_map(tree: Any, *, label: str = "log weight decay", columns: int = 64) -> "Figure":
    """Hyperparameters of every layer, one row per leaf of a tree.

    A row shows the sorted values of its leaf from least to largest, so that its left end is the
    least regularized weight or unit and its right end the most; a leaf with one value is one
    colour. The numbers at the right are the mean and the count.

    Args:
      tree: hyperparameters as a tree, such as one decay per tensor, per unit or per weight.
      label: what a value is.
      columns: resolution of a row.

    Returns:
      A matplotlib figure.
    """
    leaves = {name: leaf for name, leaf in arrays(tree).items() if leaf.size}
    if not leaves:
        raise ValueError("`tree` has no numbers: pass the hyperparameters.")
    at = np.linspace(0, 1, columns)
    image = np.stack([np.quantile(leaf, at) for leaf in leaves.values()])
    with canvas("layer_map", width=7.5, height=0.34 * len(leaves) + 1.5) as (figure, grid):
        axes = grid[0, 0]
        drawn = axes.imshow(image, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(leaves)), list(leaves))
        axes.set_xticks([0, columns - 1], ["least in the layer", "largest"])
        axes.get_xticklabels()[0].set_ha("left")
        axes.get_xticklabels()[1].set_ha("right")
        axes.grid(False)
        for row, leaf in enumerate(leaves.values()):
            many = "" if leaf.size == 1 else f" (mean of {leaf.size})"
            axes.text(columns, row, f" {leaf.mean():.3g}{many}", va="center", fontsize=9)
        figure.colorbar(drawn, ax=axes, label=label, pad=0.2, shrink=0.9)
        axes.set_title(f"{label[:1].upper()}{label[1:]} in each layer")
    return figure


def example_weights(
    weights: Any,
    images: Any = None,
    *,
    labels: Sequence[Any] | None = None,
    marked: Any = None,
    marked_label: str = "wrong label",
    count: int = 8,
) -> "Figure":
    """Learned weights of training examples: their distribution, and the extremes as a gallery.

    Args:
      weights: (examples,).
      images: (examples, height, width) or with channels; the ``count`` examples of least and of
        largest weight are shown.
      labels: a label per example, written under its image.
      marked: booleans, (examples,): examples known to be of a kind, drawn in orange.
      marked_label: what that kind is called.
      count: images per row of the gallery.

    Returns:
      A matplotlib figure.
    """
    weights = np.asarray(weights, float)
    known = None if marked is None else np.asarray(marked, bool)
    for name, given in (("images", images), ("labels", labels), ("marked", known)):
        if given is not None and len(given) != len(weights):
            raise ValueError(
                f"`{name}` has {len(given)} entries for {len(weights)} weights: pass one per "
                "example."
            )
    order = np.argsort(weights, kind="stable")
    count = min(count, len(weights) // 2 or 1)
    rows = {"least": order[:count], "largest": order[::-1][:count]}
    gallery = images is not None
    with canvas(
        "example_weights", width=max(6.0, 0.95 * count), height=5.6 if gallery else 3.0
    ) as (figure, grid):  # fmt: skip
        if gallery:
            figure.clear()
            top, *strips = figure.subfigures(3, 1, height_ratios=[2.0, 1.15, 1.15])
            axes = top.subplots()
            for strip, (name, chosen) in zip(strips, rows.items(), strict=True):
                strip.suptitle(f"{name} weight", x=0.01, ha="left", fontsize=10)
                cells = strip.subplots(1, count, squeeze=False)[0]
                for cell, i in zip(cells, chosen, strict=True):
                    _thumbnail(cell, np.asarray(images[i]), weights[i], labels, i, known)
        else:
            axes = grid[0, 0]
        bins = np.histogram_bin_edges(weights, 40)
        rest = weights if known is None else weights[~known]
        axes.hist(rest, bins, color=BLUE, label="other examples", alpha=0.9)
        if known is not None:
            axes.hist(weights[known], bins, color=ORANGE, label=marked_label, alpha=0.75)
            axes.legend(fontsize=9)
        axes.set(xlabel="learned weight", ylabel="examples", title="Weights of training examples")
    return figure


def _thumbnail(
    axes: Any, image: np.ndarray, weight: float, labels: Any, i: int, known: Any
) -> None:
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    low, high = image.min(), image.max()
    axes.imshow((image - low) / (high - low if high > low else 1), cmap="gray")
    axes.set(xticks=[], yticks=[])
    said = f"{weight:.2g}" if labels is None else f"{labels[i]}: {weight:.2g}"
    axes.set_xlabel(said, fontsize=8)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GREY if known is None or not known[i] else ORANGE)
        spine.set_linewidth(1 if known is None or not known[i] else 2.5)
