"""Every Python block of the README and of the pages under docs/ runs, in order, page by page."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    text = page.read_text()
    namespace = {"__name__": "__docs__"}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 2
        # Padding keeps line numbers of a traceback equal to those of the page.
        source = "\n" * (line - 1) + match.group(1)
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):  # the defaults of a reader
            exec(compile(source, str(page), "exec"), namespace)


def test_there_are_blocks_to_run():
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) >= 10
