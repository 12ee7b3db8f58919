"""Runs the benchmark: measures each row, records it and prints the table."""

import math
from pathlib import Path

from experiments.bench import table, workloads
from experiments.bench.config import Config
from experiments.bench.measure import Row, measure
from experiments.common import record


def run(config: Config, seed: int, out: Path, resume: bool) -> None:
    """Every row of the configuration; a resumed run skips the rows it has finished.

    All ratios are taken within one row, so nothing is lost by measuring rows at different times.
    """
    rows = dict(workloads.ROWS)
    if unknown := set(config.rows) - set(rows):
        raise ValueError(f"`rows` names {sorted(unknown)}, but there are only {list(rows)}.")
    records = record.Records(out, seed)
    finished = {r.metrics["row"] for r in record.read(out, seed=seed) if r.metrics["last"]}
    for name in config.rows or rows:
        if name not in finished:
            _measure(rows[name](config, seed), config, records)
    table.show(record.read(out, seed=seed))


def _measure(row: Row, config: Config, records: record.Records) -> None:
    """Measures one row and appends a record for each column, the last one marked."""
    results = measure(row, config.rounds, config.compilations, config.columns)
    for column, metrics in results.items():
        if isinstance(metrics, str):
            metrics = {"absent": metrics, "gradients": math.nan}
        records.append(
            f"{row.name}_{column}",
            step=0,
            cost=metrics["gradients"],
            row=row.name,
            column=column,
            title=row.title,
            data=row.data,
            last=column == list(results)[-1],
            **{key: value for key, value in metrics.items() if key != "gradients"},
        )
