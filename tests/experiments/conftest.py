"""A toy experiment in a package of its own, for the tests of the runner."""

import itertools
import json

import pytest

numbers = itertools.count()

CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    steps: int = 4
    rate: float = 0.5

def smoke():
    return Config(steps=2)

def cpu():
    return Config()
"""
RUN = """
import os
from experiments.common.record import Records, read

def run(config, seed, out, resume):
    records = Records(out, seed)
    done = len(read(out, seed=seed)) if resume else 0
    records.rewind(step=done)
    for step in range(done + 1, config.steps + 1):
        if (seed, step) == (1, 3) and "TOY_FAILS" in os.environ:
            raise KeyboardInterrupt
        records.append("cg", step, cost=10.0 * step, loss=(1 + seed) * config.rate**step)
    records.append("tpe", 1, cost=10.0, loss=1.0 + seed)
"""
FIGURE = """
from experiments.common import record
from experiments.common.figures import band, cost_axes, figure

def figures(out):
    path = out / "figures" / "loss.png"
    with figure(path) as (_, axes):
        band(axes, record.read(out), "cg", "loss")
        cost_axes(axes, "loss")
    return [path]
"""
EXPECTED = [
    {
        "name": "cg beats TPE",
        "expression": "cg.loss.mean / tpe.loss.mean",
        "relation": "<=",
        "bound": 0.9,
        "source": "ours",
        "published": 0.8,
    },
    {"name": "too good", "expression": "cg.loss.max", "bound": 1e-9, "source": "ours"},
    {
        "name": "paper only",
        "expression": "cg.loss.max",
        "bound": 1.0,
        "source": "ours",
        "presets": ["paper"],
    },
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one toy experiment, and the working directory in an empty folder."""
    name = f"toys_{next(numbers)}"
    folder = tmp_path / name / "toy"
    folder.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "not_an_experiment").mkdir()
    (folder / "__init__.py").touch()
    (folder / "config.py").write_text(CONFIG)
    (folder / "run.py").write_text(RUN)
    (folder / "figure.py").write_text(FIGURE)
    (folder / "expected.json").write_text(json.dumps(EXPECTED))
    (folder / "README.md").write_text("# toy\n\nA loss that halves.\n")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(work)
    return name
