"""The tutorials: every block runs, and the pages are those of the files."""

import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/tutorials"))
import build  # noqa: E402

sys.path.pop(0)
TUTORIALS = build.tutorials()


def name_of(path):
    return path.stem


@pytest.fixture(autouse=True)
def as_a_reader_runs_it():
    pytest.importorskip("sklearn", reason="needs bilevel[experiments]")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs bilevel[plot]")
    pyplot.switch_backend("agg")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    pyplot.close("all")


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_every_block_runs(path):
    """With few steps: this shows that nothing raises, the slow test that the text is true."""
    page = build.render(path, smoke=True)
    assert page.count("```python") >= 5 and "![" in page


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_what_the_text_says_of_the_numbers_is_true(path):
    build.render(path)


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_the_page_is_the_tutorial_with_its_outputs(path):
    page = path.with_suffix(".md").read_text("utf-8")
    assert build.without_outputs(page) == build.sources(path), (
        f"python docs/tutorials/build.py {path.stem}"
    )
    pictures = [line for line in page.splitlines() if line.startswith("![")]
    assert pictures and "```text" in page and "smoke:" not in page
    for k, line in enumerate(pictures, 1):
        assert line.endswith(f"(figures/{path.stem}_{k}.png)") and len(line) > 60


def test_every_tutorial_checks_what_it_says_and_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    start = (ROOT / "docs/start.md").read_text("utf-8")
    for path in TUTORIALS:
        checks = [cell for cell in build.cells(path) if cell.kind == "check"]
        assert any("assert" in cell.source for cell in checks), path
        assert f"- tutorials/{path.stem}.md" in navigation
        assert f"](tutorials/{path.stem}.md)" in start
    assert len(TUTORIALS) >= 5


def test_a_short_run_replaces_settings_and_leaves_out_checks(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nsteps = 100  # smoke: 2\nprint(steps)\n\n"
        "# %% figure: a dot\nclass Dot:\n    def savefig(self, path, **how):\n"
        "        path.write_text('dot')\n\n\nDot()\n\n# %% check\nassert steps == 100\n"
    )
    long, short = build.render(path, figures=tmp_path / "figures"), build.render(path, smoke=True)
    assert long.startswith("# Title\n\nText.\n\n```python\nsteps = 100\nprint(steps)\n```\n\n")
    assert "```text\n100\n```" in long and "```text\n2\n```" in short
    assert long.endswith("\n\n![a dot](figures/tiny_1.png)\n") and "check" not in long
    assert (tmp_path / "figures/tiny_1.png").read_text() == "dot"
    assert build.without_outputs(long) == build.without_outputs(short) == build.sources(path)
    path.write_text(path.read_text().replace("== 100", "== 101"))
    with pytest.raises(AssertionError):
        build.render(path)
