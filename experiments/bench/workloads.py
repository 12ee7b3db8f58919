"""All rows by name. A row is a function `(config, seed) -> Row`.

A new family of methods adds a file with a dictionary `ROWS` of its own, and that here.
"""

from collections.abc import Callable

from experiments.bench import layers, w1, w2, w3, w4, w4_unroll, w5, w6, w7
from experiments.bench.config import Config
from experiments.bench.measure import Row

ROWS: dict[str, Callable[[Config, int], Row]] = {
    **w1.ROWS,
    **w2.ROWS,
    **layers.ROWS,
    **w3.ROWS,
    **w4.ROWS,
    **w4_unroll.ROWS,
    **w5.ROWS,
    **w6.ROWS,
    **w7.ROWS,
}
