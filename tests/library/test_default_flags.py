"""Runs `default_flags/` in a process of its own, where the compiler has its default flags.

The rest of the suite compiles without LLVM's optimisations (see `tests/conftest.py`), which would
hide the faults that those tests look for.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_what_only_default_flags_can_show():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"XLA_FLAGS": "", "BILEVEL_DEFAULT_FLAGS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", str(TESTS / "default_flags")]
    run = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout
