"""The experiments there are, and their parts."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.common.outputs import RunnerError

PRESETS = ("smoke", "cpu", "paper")


def folder_of(package: str) -> Path:
    """The folder that holds the experiments of a package."""
    return Path(next(iter(importlib.import_module(package).__path__)))


def discover(package: str = "experiments") -> list[str]:
    """The experiments there are: the folders that hold `run.py`."""
    return sorted(path.parent.name for path in folder_of(package).glob("*/run.py"))


def claim_of(folder: Path) -> str:
    """The first line of text under the title of an experiment's README."""
    readme = folder / "README.md"
    lines = readme.read_text("utf-8").splitlines() if readme.exists() else []
    return next((line.strip() for line in lines if line.strip() and line[0] not in "#!["), "")


def part(package: str, name: str, module: str) -> ModuleType:
    """Imports `run`, `config` or `figure` of an experiment."""
    if name not in (known := discover(package)):
        raise RunnerError(
            f"there is no experiment {name!r}; there are: {', '.join(known) or 'none'}"
        )
    return importlib.import_module(f"{package}.{name}.{module}")


def configuration(package: str, name: str, preset: str) -> Any:
    """The configuration of an experiment at a preset."""
    module = part(package, name, "config")
    known = [word for word in PRESETS if callable(getattr(module, word, None))]
    if preset not in known:
        raise RunnerError(
            f"experiment {name!r} has no preset {preset!r}; it has: {', '.join(known)}"
        )
    return getattr(module, preset)()
