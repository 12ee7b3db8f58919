"""The benchmark runs, agrees with float64 at tiny sizes, and tells of what is absent."""

import jax.numpy as jnp
import pytest

from experiments.bench import config, figure, measure, run, table, workloads
from experiments.common import record


def test_one_row_from_run_to_figure(tmp_path):
    tiny = config.Config(
        rows=("w1_cg_fixed",), columns=("bilevel",), rounds=1, compilations=1, tiny=True
    )
    run.run(tiny, 0, tmp_path, False)
    records = {r.method: r for r in record.read(tmp_path)}
    assert set(records) == {"w1_cg_fixed_jax", "w1_cg_fixed_bilevel"}
    for r in records.values():
        # Forty CG steps in float32 on a well-conditioned 200-dimensional problem.
        assert r.metrics["error"] < 1e-4
        assert r.cost > 0 and r.metrics["temp_bytes"] > 0 and r.metrics["compile_seconds"] > 0
    assert records["w1_cg_fixed_jax"].metrics["time_ratio"] == 1

    before = (tmp_path / record.FILE).read_bytes()
    run.run(tiny, 0, tmp_path, True)
    assert (tmp_path / record.FILE).read_bytes() == before  # a finished row is not run again
    assert all(path.stat().st_size > 0 for path in figure.figures(tmp_path))
    assert "CG, 40 steps" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("name", ["w5_lstm_training", "w5_cnn_validation"])
def test_self_tuning_steps_are_those_written_by_hand(name):
    row = workloads.ROWS[name](config.Config(tiny=True), 0)
    results = measure.measure(row, rounds=1, compilations=1, only=("bilevel",))
    # One step in float32 of numbers of order one; both draw the same in float64.
    assert results["jax"]["error"] < 1e-5 and results["bilevel"]["error"] < 1e-5


@pytest.mark.parametrize("name", ["w7_tuning_layers_20", "w7_tuning_one_20"])
def test_tuning_by_dual_cg_is_that_written_by_hand(name):
    row = workloads.ROWS[name](config.Config(tiny=True), 0)
    # How far the decays move, in float64: a warm start that is kept where it is worse than zero
    # changes it by 0.06, and training alone does not move them.
    exact, ours, trained = (
        row.compared(measure.in_float64(column, row.arguments))
        for column in (row.twin, row.columns["bilevel"], row.columns["jax"])
    )
    assert measure.relative_error(ours, exact) < 1e-10
    assert measure.relative_error(trained, exact) == 1


def test_wrong_and_absent_columns_are_told(tmp_path):
    def right(params, hparams, inner_batch, outer_batch, key):
        return params * hparams

    def wrong(params, hparams, inner_batch, outer_batch, key):
        return jnp.nan * params

    def missing(params, hparams, inner_batch, outer_batch, key):
        raise ModuleNotFoundError("No module named 'absent_library'", name="absent_library")

    one = jnp.ones(3, jnp.float32)
    row = measure.Row(
        "toy",
        "toy",
        "ones",
        (one, one, one, one, one),
        lambda params, hparams, batch: jnp.sum(params * hparams * batch),
        {"jax": right, "bilevel": wrong, "lineax": missing, "jaxopt": "not offered"},
    )
    results = measure.measure(row, rounds=1, compilations=1)
    assert results["jax"]["error"] == 0
    assert results["lineax"] == "not installed (absent_library)"
    assert results["jaxopt"] == results["optimistix"] == "not offered"

    records = record.Records(tmp_path, 0)
    for column in ("jax", "bilevel"):
        records.append(
            f"toy_{column}",
            0,
            1.0,
            row="toy",
            column=column,
            title="toy",
            data="",
            **results[column],
        )
    _, body = table.grid(record.read(tmp_path))
    assert "WRONG" not in body[0][1] and "WRONG" in body[0][2]


def test_unknown_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="w9"):
        run.run(config.Config(rows=("w9",)), 0, tmp_path, False)


def test_rows_are_named_after_their_function():
    for name, make in workloads.ROWS.items():
        assert name.endswith(make.__name__)
