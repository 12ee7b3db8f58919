"""The first experiment: its problem, its costs, and that a killed run ends as if never killed."""

import dataclasses
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import record
from experiments.digits import config, methods, problem, run

ROOT = Path(__file__).parents[2]


def test_the_penalty_is_half_the_decayed_square():
    settings = config.smoke()
    params = problem.initial(settings, 0)
    operator = problem.operator(settings)
    tensor = problem.decays(params, -1.0, per_weight=False)
    weight = problem.decays(params, -1.0, per_weight=True)
    squares = sum(float(jnp.sum(w**2)) for w in jax.tree.leaves(params))
    for hparams in (tensor, weight):
        assert operator.penalty(params, hparams) == pytest.approx(0.5 * np.exp(-1) * squares, 1e-5)


@pytest.mark.parametrize("method", methods.GRADIENT)
def test_every_method_spends_the_budget_and_no_more(method):
    settings = config.cpu()
    steps, cost = methods.outer_steps(method, settings), methods.step_cost(method, settings)
    # 50 training steps, the products at 2.5, the mixed product at 2.5, and an outer gradient by the
    # share of images that it reads
    outer = 1 - methods.held(method, settings) / settings.train
    assert cost == 50 + 2.5 * settings.products + 2.5 + outer
    assert settings.budget - cost < steps * cost <= settings.budget


def test_a_finished_method_is_not_run_again(tmp_path):
    settings = dataclasses.replace(config.smoke(), budget=300.0, trial_points=2)
    batches = run._batches(settings, 0)
    records = record.Records(tmp_path, 0)
    for _ in range(2):
        run._search("random_search", settings, 0, batches, records)
    trials = record.read(tmp_path, method="random_search")
    assert [trial.step for trial in trials] == [0, 1, 2]
    best = np.minimum.accumulate([trial.metrics["trial_loss"] for trial in trials])
    assert [trial.metrics["validation_loss"] for trial in trials] == best.tolist()


def _command(out: Path, *flags: str) -> list[str]:
    options = ("--preset", "smoke", "--out", str(out))
    return [sys.executable, "-m", "experiments", "run", "digits", *options, *flags]


def _same_bits(whole: Path, killed: Path) -> None:
    assert (whole / record.FILE).read_bytes() == (killed / record.FILE).read_bytes()
    paths = list((whole / "arrays").glob("*.npz"))
    assert len(paths) == len(methods.GRADIENT)
    for path in paths:
        with np.load(path) as a, np.load(killed / "arrays" / path.name) as b:
            assert all(a[name].tobytes() == b[name].tobytes() for name in a.files)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    subprocess.run(_command(whole), cwd=ROOT, check=True, capture_output=True)
    duration = time.monotonic() - begun
    chance, kills, flags = random.Random(0), 0, ()
    while kills < 10:
        process = subprocess.Popen(
            _command(killed, *flags), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            process.wait(chance.uniform(0.15, 0.6) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            flags = ("--resume",) if killed.exists() else ()
        else:  # it reached the end before its next kill: judge it, and kill another run
            assert process.returncode == 0
            _same_bits(whole, killed)
            shutil.rmtree(killed)
            flags = ()
    subprocess.run(_command(killed, *flags), cwd=ROOT, check=True, capture_output=True)
    _same_bits(whole, killed)
