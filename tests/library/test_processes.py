"""Two processes with four devices each drive one run: equal to one, durable, of one mind."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes_run
import pytest

ROOT = Path(__file__).parents[2]


def two(folder, what=""):
    """Runs both processes to their ends; what each wrote, or None where it died."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, processes_run.__file__, str(rank), port, str(folder), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=240) for process in both]
    finally:
        for process in both:
            process.kill()
    if what == "kill":
        assert all(process.returncode for process in both), told
        return None
    assert not any(process.returncode for process in both), told
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process; two that first disagree; two of which one is killed; two that go on."""
    folder = tmp_path_factory.mktemp("runs")
    one = processes_run.numbers(processes_run.run(folder / "one"))
    whole = two(folder / "two", "disagree")
    two(folder / "killed", "kill")
    left = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("0*"))
    return one, whole, left, two(folder / "killed"), folder


def test_two_processes_equal_one(runs):
    one, (first, second), *_ = runs
    for name in ("value", "decay", "b"):
        np.testing.assert_allclose(first[name], one[name], rtol=1e-6)
        assert first[name] == second[name]


def test_one_process_writes_the_log(runs):
    *_, folder = runs
    lines = (folder / "two" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(processes_run.STEPS))


def test_a_killed_process_leaves_a_run_that_resumes(runs):
    _, whole, left, resumed, folder = runs
    assert left == ["00000002", "00000004"]
    for a, b in zip(resumed, whole, strict=True):
        assert a["resumed_from"] == 4
        assert (a["value"], a["decay"], a["b"]) == (b["value"], b["decay"], b["b"])
    lines = (folder / "killed" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(processes_run.STEPS))


def test_processes_that_disagree_are_refused(runs):
    for process in runs[1]:
        assert "`state.outer.hparams['decay']`" in process["refused"]
        assert "process 1 differs from process 0" in process["refused"]
