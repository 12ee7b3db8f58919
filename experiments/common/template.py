"""`python -m experiments new NAME`: a small experiment that runs, to be changed."""

import re
from pathlib import Path

from experiments.common.catalog import discover, folder_of
from experiments.common.outputs import RunnerError

BLANK = Path(__file__).parent / "blank"
FILES = ("__init__.py", "README.md", "config.py", "run.py", "figure.py", "expected.json")


def write(name: str, package: str = "experiments") -> Path:
    """Copies the files of `common/blank` under a new name; returns the folder."""
    folder = folder_of(package) / name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RunnerError(f"the name must be lower case letters, digits and _, got {name!r}")
    if name in discover(package) or folder.exists():
        raise RunnerError(f"{folder} exists already; choose another name")
    folder.mkdir()
    for file in FILES:
        text = (BLANK / file).read_text("utf-8")
        text = text.replace("experiments.common.blank", f"{package}.{name}").replace("NAME", name)
        (folder / file).write_text(text, "utf-8")
    return folder
