"""Runs the tutorials and writes their pages: `python docs/tutorials/build.py [NAME ...]`.

A tutorial is a Python file of cells, as Jupyter (through jupytext), VS Code and Spyder open it:

    # %% [markdown]        text, in comments
    # %%                   code; what it prints and the figure it ends with go on the page
    # %% figure: words     the same, with the words that describe the picture to who cannot see it
    # %% check             claims of the text as assertions; run, and not on the page

Where a line of code ends in `# smoke: value`, a short run (`--smoke`, for the tests) assigns that
value instead, and skips the checks. The comment is not on the page. Needs the extras `plot` and
`experiments` (scikit-learn, whose data sets come with it).
"""

import ast
import contextlib
import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CELL = re.compile(r"^# %%[ ]*(.*)$", re.MULTILINE)
SMOKE = re.compile(r"^(\s*\w+ = )(.*?)  # smoke: (.*)$", re.MULTILINE)
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.titlelocation": "left",
}  # fmt: skip


class Cell(NamedTuple):
    """One cell: `text`, `code` or `check`, with the line it starts at."""

    kind: str
    source: str
    line: int
    picture: str = ""


def cells(path: Path) -> list[Cell]:
    """The cells of a tutorial, in order."""
    text = path.read_text("utf-8")
    marks = list(CELL.finditer(text))
    found = []
    for mark, end in zip(marks, [m.start() for m in marks[1:]] + [len(text)], strict=True):
        body, line = text[mark.end() : end].strip("\n"), text[: mark.end()].count("\n") + 2
        if mark[1] == "[markdown]":
            body = "\n".join(re.sub(r"^# ?", "", row) for row in body.splitlines())
            found.append(Cell("text", body, line))
        elif mark[1] == "check":
            found.append(Cell("check", body, line))
        else:
            found.append(Cell("code", body, line, mark[1].removeprefix("figure:").strip()))
    return found


def run_cell(cell: Cell, path: Path, namespace: dict[str, Any], smoke: bool) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line where that is an expression."""
    source = SMOKE.sub(r"\1\3", cell.source) if smoke else cell.source
    tree = ast.parse("\n" * (cell.line - 1) + source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(path), "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)
    return printed.getvalue(), value


def render(path: Path, smoke: bool = False, figures: Path | None = None) -> str:
    """The page of a tutorial, every cell run; its pictures are saved in `figures`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return _render(path, smoke, figures)


def _render(path: Path, smoke: bool, figures: Path | None) -> str:
    namespace: dict[str, Any] = {"__name__": "__tutorial__"}
    parts, pictures = [], 0
    for cell in cells(path):
        if cell.kind == "text":
            parts.append(cell.source)
            continue
        if smoke and cell.kind == "check":
            continue
        printed, value = run_cell(cell, path, namespace, smoke)
        if cell.kind == "check":
            continue
        parts.append(shown(cell))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
        if callable(getattr(value, "savefig", None)):
            pictures += 1
            name = f"{path.stem}_{pictures}.png"
            if figures is not None:
                figures.mkdir(exist_ok=True)
                value.savefig(figures / name, dpi=90, metadata={"Software": None})
            parts.append(f"![{cell.picture}](figures/{name})")
    return "\n\n".join(parts) + "\n"


def shown(cell: Cell) -> str:
    """A cell of code as it is on the page."""
    source = SMOKE.sub(r"\1\2", cell.source).replace("  # fmt: skip", "")
    return f"```python\n{source}\n```"


def without_outputs(page: str) -> str:
    """A page without what its cells printed and drew: what must equal the tutorial's file."""
    page = re.sub(r"\n\n```text\n.*?\n```(?=\n)", "", page, flags=re.DOTALL)
    return re.sub(r"\n\n!\[[^\]]*\]\(figures/[^)]*\)", "", page)


def sources(path: Path) -> str:
    """The page of a tutorial without outputs, nothing run."""
    kept = [cell for cell in cells(path) if cell.kind != "check"]
    return "\n\n".join(c.source if c.kind == "text" else shown(c) for c in kept) + "\n"


def tutorials() -> list[Path]:
    """The files of the tutorials, in the order of their names."""
    return sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def main(arguments: list[str], tell: Callable[[str], object] = print) -> int:
    """Writes the pages that are named, or all."""
    smoke, names = "--smoke" in arguments, [a for a in arguments if not a.startswith("-")]
    chosen = [path for path in tutorials() if not names or path.stem in names]
    if not chosen:
        tell(f"no tutorial has this name; there are {[path.stem for path in tutorials()]}")
    for path in chosen:
        start = time.perf_counter()
        page = render(path, smoke, None if smoke else HERE / "figures")
        if not smoke:
            path.with_suffix(".md").write_text(page, "utf-8")
        tell(f"{path.stem}: {time.perf_counter() - start:.0f} s")
    return 0 if chosen else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
