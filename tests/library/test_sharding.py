"""Responses and loops on eight devices, examples or parameters divided: equal, no more gathers.

`sharding_table.py` holds the rows; `test_every_row` (slow) runs each with both kinds of meshes and
all placements.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPLICIT = ("Lineax", "minimize(optimistix)")
"""Rows of other packages that explicit axes are refused to."""
WHOLE = {  # operations of a device, over those of one, where a part is made on every device
    "Woodbury": 1.1, "Woodbury(rows)": 1.0, "CG(KFAC)": 0.4, "CG(EKFAC)": 0.4, "EKFAC": 0.4,
}  # fmt: skip
ROWS = ("gradient", "product", "CG", "Neumann", "Nystrom", "Unroll(sqrt)", "FiniteDifference",
        "alternate", "self_tuning", "soba", "f2sa")  # fmt: skip
DIVIDED = ("gradient", "product", "CG", "Neumann", "DynamicLanczos", "CG(Diagonal)", "DualCG",
           "EKFAC", "FiniteDifference", "Unroll(sqrt)", "Unroll(forward)", "Evolution", "alternate",
           "soba", "stocbio", "f2sa", "hoag", "maid", "bo_rep", "scan_run",
           "with_response")  # fmt: skip
WEIGHTS = ("accumulate", "weights of examples, CG", "weights of examples, Unroll",
           "influence(CG)", "influence(CG, per query)", "influence(Unroll)",
           "influence(Unroll, rows)")  # fmt: skip
POPULATIONS = ("alternate", "scan_run", "CG", "Unroll(sqrt)", "hoag", "minimize")


@functools.cache
def table(kind, placement, names=()):
    # Another process: the number of virtual devices is fixed when JAX starts.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/sharding_table.py"), kind, placement, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def rows():
    return table("Explicit", "examples", ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_sharded_equals_replicated(rows, name):
    row = rows[name]
    assert "error" not in row and row["far"] <= 1e-6 and row["kept"], row
    assert row["moves"].keys() == {"all-reduce"}, row
    # An eighth, and what is of the size of the parameters.
    assert row["flops"] <= 0.2 and row["bytes"] <= 0.25, row


def test_a_product_moves_what_a_gradient_moves(rows):
    assert rows["product"]["moves"] == rows["gradient"]["moves"]


def check_divided(kind, found):
    for name, row in found.items():
        if kind == "Explicit" and name in EXPLICIT:
            assert "fails on a mesh with explicit axes: " in row["error"], (name, row)
            continue
        assert "error" not in row and row["far"] <= 1e-6, (name, row)
        # On an Auto mesh the compiler places results, unless `out_shardings` does.
        assert row["kept"] or kind == "Auto", (name, row)
        assert row["flops"] <= WHOLE.get(name, 0.25), (name, row)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_divided_parameters_equal_replicated_ones(kind):
    """Fully sharded: each weight is gathered where the loss reads it."""
    rows = table(kind, "weights", (*DIVIDED, *EXPLICIT, "Woodbury"))
    check_divided(kind, rows)
    assert rows["product"]["moves"] == rows["gradient"]["moves"]


def test_divided_parameters_of_a_search():
    """L-BFGS of divided parameters makes the steps of optax's, which an explicit mesh refuses."""
    check_divided("Explicit", table("Explicit", "weights", ("minimize",)))


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_divided_hyperparameters_and_micro_batches(kind):
    """Each example has a hyperparameter, which lies where the example does."""
    rows = table(kind, "examples", WEIGHTS)
    check_divided(kind, rows)
    for name in WEIGHTS[:3]:
        assert rows[name]["moves"].keys() == {"all-reduce"}, (name, rows[name])


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_populations_equal_those_of_one_device(kind):
    rows = table(kind, "seeds", POPULATIONS)
    check_divided(kind, rows)
    for name, row in rows.items():
        assert row["flops"] <= 0.15, (name, row)
        # Mapped loops go on together: all devices ask whether one of them is to go on.
        assert row["moves"].keys() <= ({"all-reduce"} if kind == "Auto" else set()), (name, row)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["examples", "weights", "seeds"])
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_every_row(kind, placement):
    check_divided(kind, table(kind, placement))
