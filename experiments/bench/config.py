"""Which rows are measured, at which size and how often."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of the benchmark.

    Attributes:
      rows: names of the rows to measure; empty for all of `workloads.ROWS`.
      columns: names of the columns to measure; empty for all of `measure.COLUMNS`. The
        hand-written one is always measured, because every ratio is taken against it.
      rounds: interleaved rounds A B C ... C B A; ratios are medians over them.
      compilations: times each function is traced and compiled; the least time is reported.
      tiny: sizes that compile and run in moments, to exercise the code and nothing else.
    """

    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rounds: int = 5
    compilations: int = 2
    tiny: bool = False


def smoke() -> Config:
    """One row of each workload at tiny sizes: does everything run and agree?"""
    return Config(
        rows=("w1_cg_fixed", "w2_neumann_gn", "w4_step"), rounds=1, compilations=1, tiny=True
    )


def cpu() -> Config:
    """All rows at full size."""
    return Config()


def paper() -> Config:
    """All rows at full size, with more rounds."""
    return Config(rounds=21, compilations=3)
