"""Where a run is displayed: a progress bar, TensorBoard."""

import os

from bilevel.run.record import Record


class TensorBoard:
    """Scalars of every step for TensorBoard."""

    def __init__(self, folder: str | os.PathLike[str], start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                '`tensorboard` needs tensorboardX: pip install "bilevel[fit]".'
            ) from None
        # Events of an interrupted run that lie ahead of `start` are hidden by `purge_step`.
        try:
            self._writer = SummaryWriter(str(folder), purge_step=start)
        except OSError as error:
            raise OSError(
                f"`tensorboard` {folder} cannot be written ({error}): choose a folder you may "
                "write to, or leave it out."
            ) from error

    def write(self, record: Record) -> None:
        """Every scalar of the record under its name."""
        for name, value in record.items():
            if name == "hparams":
                for leaf, entry in value.items():
                    if not isinstance(entry, list):
                        self._writer.add_scalar(f"hparams/{leaf}", entry, record["step"])
            elif name not in ("step", "seconds") and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Flush."""
        self._writer.flush()

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


class Bar:
    """A live line on the terminal: losses, hypergradient norm, residual, steps per second."""

    def __init__(self, start: int, steps: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._start = start
        # Narrow, so that a line with a status still fits 80 columns.
        told = TextColumn("{task.fields[told]}")
        self._progress = Progress(MofNCompleteColumn(), BarColumn(bar_width=8), told)
        self._progress.start()
        self._task = self._progress.add_task("outer steps", total=steps, completed=start, told="")

    def write(self, record: Record) -> None:
        """Show one step."""
        status = record.get("status", "ok")
        names = {"inner": "inner_loss", "outer": "outer_loss", "|grad|": "hypergrad_norm"}
        if status == "ok":  # else the status says what the residual would hint at
            names["residual"] = "residual_norm"
        parts = [f"{label} {record[name]:.3g}" for label, name in names.items() if name in record]
        if status != "ok":
            parts.append(f"[yellow]{status}[/yellow]")
        if record["seconds"] > 0:
            parts.append(f"{(record['step'] + 1 - self._start) / record['seconds']:.3g}/s")
        self._progress.update(self._task, completed=record["step"] + 1, told=" ".join(parts))

    def sync(self) -> None:
        """Nothing to make durable."""

    def tell(self, line: str) -> None:
        """Leave a line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._progress.stop()


def wants_bar(progress: bool) -> bool:
    """Whether to draw a bar: asked for, and there is a terminal to draw it on."""
    if not progress:
        return False
    try:
        from rich.console import Console
    except ImportError:
        return False
    return Console().is_terminal
