"""The picture of `games`, from saved records."""

from pathlib import Path

import numpy as np

from experiments.common import figures as draw
from experiments.common import record

NAMES = {
    "plain": ("none", draw.GREY),
    "positive": ("0.9", draw.BLACK),
    "negative": ("−0.9", draw.GOLD),
    "complex_half": ("0.9 at π/2", draw.SKY),
    "complex_quarter": ("0.9 at π/4", draw.GREEN),
    "complex_eighth": ("0.9 at π/8", draw.BLUE),
    "complex_paper": ("0.8 + 0.3i", draw.ORANGE),
}


def figures(out: Path) -> list[Path]:
    """Distances to the equilibrium, and the map of spectral radii."""
    records = record.read(out)
    path = out / "figures" / "games.png"
    with draw.figure(path, columns=3, width=15.0, height=4.4) as (drawn, axes):
        for panel, game in zip(axes, ("bilinear", "mixed"), strict=False):
            for method, (name, shade) in NAMES.items():
                steps, values = draw.curves(records, f"{game}_{method}", "ratio")
                panel.plot(steps, np.median(values, 0), color=shade, label=name)
            panel.axhline(1.0, color=draw.BLACK, linewidth=0.8, linestyle=":")
            panel.set(yscale="log", xlabel="step")
        axes[0].set_ylim(1e-7, 1e4)
        axes[1].set_ylim(1e-2, 1e2)
        axes[0].set(
            title="Rotating game: π/8 converges, 0.9 diverges",
            ylabel="distance to the equilibrium, relative to the start",
        )
        axes[1].set(title="Rotation with descent: the same")
        axes[1].legend(title="momentum", loc="upper right", fontsize=8)
        saved = record.load_arrays(out, "map")
        radii = saved["radii"]
        image = axes[2].pcolormesh(
            saved["angles"], saved["rates"], np.clip(radii, 0.95, 1.05), cmap="RdBu_r",
            vmin=0.95, vmax=1.05, shading="nearest", rasterized=True,
        )  # fmt: skip
        axes[2].contour(saved["angles"], saved["rates"], radii, levels=[1.0], colors=draw.BLACK)
        axes[2].set(
            yscale="log",
            xlabel="angle of the momentum, in units of π",
            ylabel="step size",
            title="Magnitude 0.9 converges where the map is blue",
        )
        axes[2].grid(visible=False)
        bar = drawn.colorbar(image, ax=axes[2])
        bar.set_label("spectral radius (below 1: converges)")
    return [path]
