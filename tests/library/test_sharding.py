"""Every response with its solvers and every loop on eight devices: equal, divided, not gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["Auto examples", "Auto weights", "Explicit examples",
                                        "Explicit weights"])  # fmt: skip
def rows(request):
    # Another process: the number of virtual devices is fixed when JAX starts.
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/sharding_table.py"), *request.param.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_sharded_equals_replicated(rows):
    failed = [row for row in rows[1] if "error" in row or not row["far"] <= 1e-6]
    assert not failed
