"""All rows by name. A row is a function `(config, seed) -> Row`.

A new family of methods adds a file with a dictionary `ROWS` of its own, and that here.
"""

from collections.abc import Callable

from experiments.bench import w1, w2, w4
from experiments.bench.config import Config
from experiments.bench.measure import Row

ROWS: dict[str, Callable[[Config, int], Row]] = {**w1.ROWS, **w2.ROWS, **w4.ROWS}
