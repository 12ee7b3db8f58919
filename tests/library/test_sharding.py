"""Responses and loops on eight devices, examples divided on an explicit mesh: equal, no gathers.

`sharding_table.py` holds more rows, both kinds of meshes, and divided parameters.
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


@pytest.fixture(scope="module")
def rows():
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/sharding_table.py"), "Explicit", "examples", *ROWS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ROWS)
def test_sharded_equals_replicated(rows, name):
    row = rows[name]
    assert "error" not in row and row["far"] <= 1e-6 and row["kept"], row
    assert row["moves"].keys() == {"all-reduce"}, row
    # An eighth, and what is of the size of the parameters.
    assert row["flops"] <= 0.2 and row["bytes"] <= 0.25, row


def test_a_product_moves_what_a_gradient_moves(rows):
    assert rows["product"]["moves"] == rows["gradient"]["moves"]
