"""The table of a run, from its records alone."""

from collections.abc import Iterable

from experiments.bench.measure import COLUMNS
from experiments.common.record import Record

WRONG = 0.5


def _cells(record: Record) -> str:
    metrics = record.metrics
    if "absent" in metrics:
        return metrics["absent"]
    lines = [
        f"{metrics['time_ratio']:.2f} x  {record.cost:.3g} g",
        f"{metrics['temp_bytes'] / 2**20:.3g} MiB  {metrics['compile_seconds']:.2f} s",
    ]
    if "error" in metrics:
        # A NaN compares false with everything, so it is not "below" and counts as wrong.
        verdict = "" if metrics["error"] < WRONG else "  WRONG"
        lines.append(f"err {metrics['error']:.1e}{verdict}")
    return "\n".join(lines)


def grid(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: in a cell time ratio, gradients, temporary MiB, compile seconds, error."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(record.metrics["row"], {})[record.metrics["column"]] = record
    used = [name for name in COLUMNS if any(name in row for row in rows.values())]
    body = []
    for row in rows.values():
        first = next(iter(row.values())).metrics
        cells = [_cells(row[name]) if name in row else "not measured" for name in used]
        body.append([f"{first['title']}\n({first['data']})", *cells])
    return ["row", "hand-written JAX", *used[1:]], body


def show(records: Iterable[Record]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    header, body = grid(records)
    caption = (
        "x: time / hand-written, median of ratios within a round; g: time / one gradient of the "
        "inner loss; MiB: temporary memory by XLA; s: trace and compile; err: against float64"
    )
    table = Table(*header, title="bench", caption=caption, show_lines=True)
    for cells in body:
        table.add_row(*cells)
    Console().print(table)


def markdown(records: Iterable[Record]) -> str:
    """The same table for a page."""
    header, body = grid(records)
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for cells in body:
        lines.append("| " + " | ".join(cell.replace("\n", "<br>") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
