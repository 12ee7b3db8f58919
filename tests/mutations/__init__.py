"""Small mistakes put into the library on purpose, room by room; each must be noticed by a test.

A mutant replaces one piece of text, which must occur exactly once in its file, so that a change of
the library that touches it is told (``tests/library/test_mutants.py``). ``python tests/mutants.py``
runs them.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("tests/library", "tests/experiments")


def path_of(test: str, root: Path = ROOT) -> str:
    """A test by its path from the root: ``tests/library/test_linear.py::test_name``."""
    file = test.split("::")[0]
    folder = next((f for f in FOLDERS if (root / f / file).exists()), FOLDERS[0])
    return f"{folder}/{test}"


class Mutant(NamedTuple):
    """One mistake.

    Attributes:
      name: short, unique, for ``--only``.
      file: the file it is made in, below ``bilevel/``.
      old: text that occurs exactly once in that file.
      new: what stands there instead.
      means: what a user would get.
      tests: test files or node ids, one of which must fail: ``test_linear.py::test_name``, in
        ``tests/library/`` or ``tests/experiments/``.
      survives: why no test can tell (the program is equivalent), else None.
    """

    name: str
    file: str
    old: str
    new: str
    means: str
    tests: tuple[str, ...]
    survives: str | None = None

    def apply(self, text: str) -> str:
        """The text of the file with the mistake in it."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(
                f"{self.name}: the text to replace occurs {found} times in {self.file}"
            )
        return text.replace(self.old, self.new)


def all_mutants() -> list[Mutant]:
    """The mutants of every room, in the order of the files here."""
    rooms = sorted(m.name for m in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{room}").MUTANTS for room in rooms]
    return [mutant for room in found for mutant in room]
