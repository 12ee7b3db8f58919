"""Responses and loops on eight devices, examples or parameters divided: equal, no more gathers.

`sharding_table.py` holds more rows, both kinds of meshes, and both placements.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = ("gradient", "product", "CG", "Neumann", "Nystrom", "Unroll(sqrt)", "FiniteDifference",
        "alternate", "self_tuning", "soba", "f2sa")  # fmt: skip


DIVIDED = ("gradient", "product", "CG", "Neumann", "DynamicLanczos", "CG(Diagonal)",
           "FiniteDifference", "alternate")  # fmt: skip


def table(kind, placement, names):
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/sharding_table.py"), kind, placement, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
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


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_divided_parameters_equal_replicated_ones(kind):
    """Fully sharded: each weight is gathered where the loss reads it."""
    rows = table(kind, "weights", DIVIDED)
    for name in DIVIDED:
        row = rows[name]
        assert "error" not in row and row["far"] <= 1e-6, (name, row)
        # On an Auto mesh the compiler places results, unless `out_shardings` does.
        assert row["kept"] or kind == "Auto", (name, row)
        assert row["flops"] <= 0.25, (name, row)
    assert rows["product"]["moves"] == rows["gradient"]["moves"]
