"""Every picture renders once, small, from what `fit` logs; and refuses what it cannot draw."""

import io
import json

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs bilevel[plot]")

from bilevel import Identity, plot
from bilevel.tools.memory import MemoryReport, MemoryRow


def run(seed=0, steps=6, **changes):
    """A history as `fit` leaves it, with one odd step."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": i,
            "outer_loss": 1 / (i + 1) + 0.1 * rng.random(),
            "status": "negative_curvature" if i == 3 else "ok",
            "residual_norm": 0.5 if i == 3 else 0.01,
            "rhs_norm": 1.0 if i else 0.0,
            "min_curvature": -0.1 if i == 3 else 0.2,
            "max_curvature": 3.0,
            "relative_stationarity": 0.01 * (i + 1),
            "cost": 10.0 + seed,
            "hparams": {"decay": float(i), "pair": [1.0, float(-i)], "w/norm": 2.0, "w/min": -1.0,
                        "w/mean": 0.1 * i, "w/max": 1.0},
            **changes,
        }
        for i in range(steps)
    ]  # fmt: skip


def rendered(figure):
    """The figure as a PNG was drawn; its texts, whichever axes they belong to."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG") and len(file.getvalue()) > 2000
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_trajectories_of_several_starts(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(record) for record in run()) + "\n")
    figure = plot.trajectories({"low": log, "high": run(1)}, labels={"decay": "log decay"})
    told = rendered(figure)
    assert {"log decay", "pair[0]", "pair[1]", "w", "low", "high"} <= set(told)
    decay = figure.axes[0]
    np.testing.assert_array_equal(decay.lines[0].get_ydata(), range(6))
    assert len(figure.axes[3].collections) == 2, "a band where the log holds a summary"
    assert "w/max" in rendered(plot.trajectories(run(), ["w/max"]))
    with pytest.raises(ValueError, match=r"`names` holds \['decoy'\], which were not logged"):
        plot.trajectories(run(), ["decoy"])


def test_a_strip_of_trust_marks_what_is_doubtful():
    figure = plot.trust_strip(run())
    told = rendered(figure)
    assert "ok (5 of 6)" in told and "negative_curvature (1 of 6)" in told
    residual = figure.axes[0]
    np.testing.assert_array_equal(residual.lines[1].get_xdata(), [3])  # above a tenth
    assert len(figure.axes) == 4
    bare = [{"step": 0, "outer_loss": 1.0}]
    assert "no status (1 of 1)" in rendered(plot.trust_strip(bare))


def test_curves_against_cost_have_a_band_over_seeds():
    figure = plot.cost_curves({"cg": [run(0), run(1)], "tpe": [run(2)]})
    assert {"Validation loss", "cg", "tpe"} <= set(rendered(figure))
    cg = figure.axes[0].lines[0].get_xdata()
    assert cg[0] == 11.0 and cg[-1] == 60.0  # from the dearest first step to the cheapest end
    both = plot.cost_curves({"cg": [run(evaluate=0.3)]}, log=True)
    assert "Test loss" in rendered(both)
    with pytest.raises(ValueError, match="`methods` must map names to lists of runs"):
        plot.cost_curves({"cg": []})


def test_maps_of_pixels_and_layers():
    figure = plot.pixel_map(np.arange(12.0).reshape(6, 2), (2, 3))
    assert any("minus its median (5.5)" in text for text in rendered(figure))
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image[0], [-5.0, -3.0, -1.0])
    with pytest.raises(ValueError, match=r"`shape` \(2, 2\) has 4 pixels, but `values` has 6"):
        plot.pixel_map(np.zeros((6, 2)), (2, 2))
    with pytest.raises(ValueError, match="`values` is flat"):
        plot.pixel_map(np.zeros(6))
    told = rendered(plot.layer_map({"conv": {"kernel": np.arange(4.0)}, "bias": -8.0}))
    assert "conv/kernel" in told and any("1.5 (mean of 4)" in text for text in told)
    with pytest.raises(ValueError, match="`tree` has no numbers"):
        plot.layer_map({})


def test_weights_of_examples_show_the_extremes():
    weights = np.array([0.9, 0.1, 0.5, 0.7])
    images = np.arange(4.0)[:, None, None] * np.eye(3)
    told = rendered(
        plot.example_weights(
            weights, images, labels="abcd", marked=weights < 0.2, count=2
        )  # fmt: skip
    )
    assert {"b: 0.1", "c: 0.5", "a: 0.9", "d: 0.7", "wrong label", "least weight"} <= set(told)
    assert "learned weight" in rendered(plot.example_weights(weights))
    with pytest.raises(ValueError, match="`labels` has 2 entries for 4 weights"):
        plot.example_weights(weights, labels="ab")


def test_a_surface_under_the_path_of_a_run():
    x, y = np.linspace(-1, 1, 4), np.linspace(0, 1, 3)
    figure = plot.response_surface(lambda a, b: a**2 + b, x, y, path=[[1, 1], [0, 0]])
    assert {"start of the run", "its end", "lowest on the grid"} <= set(rendered(figure))
    with pytest.raises(ValueError, match=r"`values` has shape \(4, 3\), expected"):
        plot.response_surface(np.zeros((4, 3)), x, y)
    with pytest.raises(ValueError, match=r"`path` has shape \(2,\)"):
        plot.response_surface(np.zeros((3, 4)), x, y, path=[1, 1])


def test_bars_of_memory_and_time():
    rows = [MemoryRow(name, Identity(), 2**20, 2**21, 2**19, 2**22, 1.5) for name in ("a", "b")]
    report = MemoryReport(tuple(rows))
    told = rendered(plot.resource_bars(report))
    assert {"Seconds to compile", " 3.5", " 1.5", "working memory"} <= set(told)
    assert "Seconds per call" in rendered(plot.resource_bars(report, {"a": 1.0, "b": 2.0}))
    with pytest.raises(ValueError, match="`seconds` has 1 entries for 2 rows"):
        plot.resource_bars(report, [1.0])
    with pytest.raises(TypeError, match="`report` must be what `memory_report` returned"):
        plot.resource_bars(rows)


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match="`run` must be what `fit` returned"):
        plot.trust_strip(3)
    with pytest.raises(ValueError, match="`run` has no records with a `step`"):
        plot.trust_strip([{"loss": 1.0}])
    with pytest.raises(ValueError, match="`run` has no `hparams`"):
        plot.trajectories([{"step": 0}])
