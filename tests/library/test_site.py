"""The documentation site: every name has its place, every picture its page; formulas survive."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import bilevel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/site"))
import formulas  # noqa: E402
import hooks  # noqa: E402
import plain_english  # noqa: E402

sys.path.pop(0)

SPACES = [name for name in bilevel.__all__ if inspect.ismodule(getattr(bilevel, name))]


def public(module):
    """The names of a namespace, those of the library only."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("bilevel")
    }


def test_every_public_name_is_on_a_page_of_the_api():
    pages = hooks.listed() | set(re.findall(r"^::: bilevel\.(\S+)$", hooks.more(), re.MULTILINE))
    last = {name.rpartition(".")[2] for name in pages}
    missing = public(bilevel) - pages
    for space in SPACES:
        module = importlib.import_module(getattr(bilevel, space).__name__)
        top = "regularizers.prox" if space == "prox" else space
        found = {n for n in public(module) if inspect.getmodule(getattr(module, n)) is not None}
        if space == "prox":
            found = {n for n in found if getattr(module, n).__module__ == module.__name__}
        missing |= {f"{top}.{name}" for name in found if name not in last}
    assert not missing, f"no page under docs/api has {sorted(missing)}"


def test_what_the_pages_name_is_there():
    for name in sorted(hooks.listed()):
        value = bilevel
        for part in name.split("."):
            value = getattr(value, part)
        assert inspect.getdoc(value), name


def test_the_api_shows_functions_and_not_the_modules_of_their_name(monkeypatch):
    griffe = pytest.importorskip("griffe", reason="needs bilevel[docs]")
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    docstrings = importlib.import_module("docstrings")
    extensions = griffe.load_extensions(docstrings.Docstrings)
    package = griffe.load("bilevel", search_paths=[str(ROOT)], extensions=extensions)
    for name in sorted(hooks.listed() | hooks.api_names()):
        shown = package
        for part in name.split("."):
            shown = shown.members[part]
        assert not shown.is_module and shown.docstring is not None, name


def test_the_gallery_has_every_committed_picture_and_its_command():
    page = hooks.gallery()
    pictures = sorted((ROOT / "experiments").glob("*/results/*.png"))
    assert len(pictures) > 30
    for picture in pictures:
        name = picture.parts[-3]
        assert f"](papers/{name}/{picture.name})" in page, picture
        assert f"python -m experiments run {name} --preset cpu" in page


def test_links_lead_to_places_on_the_site():
    text = "[a](../bilevel/linear/cg.py) [b](math.md#notation) [c](../experiments/digits/) `[d](x)`"
    linked, needed = hooks.relinked(text, "docs/choose.md", "choose.md")
    assert "](source/bilevel/linear/cg.py.md)" in linked and "](papers/digits.md)" in linked
    assert "](math.md#notation)" in linked
    assert needed == {"bilevel/linear/cg.py", "docs/math.md", "experiments/digits/README.md"}
    deep, _ = hooks.relinked("![x](results/losses.png)", "experiments/digits/README.md",
                             "papers/digits.md")  # fmt: skip
    assert deep == "![x](digits/losses.png)"
    code = "```python\n[a](../bilevel/linear/cg.py)\n```\n"
    assert hooks.relinked(code, "docs/choose.md", "choose.md")[0] == code


def test_docstrings_become_markdown(monkeypatch):
    pytest.importorskip("griffe", reason="needs bilevel[docs]")
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    docstrings = importlib.import_module("docstrings")
    text = (
        "One of :math:`x^2`; see :func:`~bilevel.hypergrad`, :class:`Other`.\n\n"
        "    .. math:: a = b,\n        \\quad c\n\n    More.\n\n"
        "Args:\n  w, lam: one,\n    two.\n  *rest: three.\n\nCost: four.\n\nExample:\n  >>> 1\n"
    )
    out = docstrings.markdown(text, frozenset({"hypergrad"}))
    assert "One of $x^2$; see [`hypergrad`][bilevel.hypergrad], `Other`." in out
    assert "    $$\n    a = b,\n    \\quad c\n    $$\n" in out and "\n    More.\n" in out
    assert "**Arguments**\n\n- `w, lam`: one,\n    two.\n- `*rest`: three.\n\nCost: four." in out
    assert out.endswith("**Example**\n\n```pycon\n>>> 1\n```")
    fields = ["count(100)", "real(0.0, low=0)", "dataclasses.field(default=None, metadata={})",
              "field(default_factory=dict)", "CG()", "3"]  # fmt: skip
    assert [docstrings.default_of(f) for f in fields] == ["100", "0.0", "None", None, "CG()", "3"]


def test_formulas_are_symbols_in_a_terminal_and_typeset_on_the_site(monkeypatch):
    source = (
        'def f():\n    r"""The slope :math:`\\tfrac{dF}{d\\lambda}`, of ``\\lambda``.\n\n'
        "    .. math:: q &= -\\Bigl(\\nabla^2 h\\Bigr)^{-1} g, \\qquad\\text{for}\\quad "
        '\\|g\\| \\le \\log\\rho \\\\\n        s &= B^\\top q\n    """\n    return r"\\lambda"\n'
    )
    plain = formulas.rewritten(source)
    assert ":math:`dF/dλ`, of ``\\lambda``" in plain and 'return r"\\lambda"' in plain
    assert "q &= -(∇^2 h)^{-1} g,  for  ‖g‖ ≤ log ρ \\\\\n        s &= Bᵀ q\n" in plain
    assert formulas.rewritten(plain) == plain
    pytest.importorskip("griffe", reason="needs bilevel[docs]")
    monkeypatch.syspath_prepend(ROOT / "docs/site")
    docstrings = importlib.import_module("docstrings")
    assert docstrings.typeset(r"λ_{max},  for ‖g‖ \text{all of it}") == (
        r"λ_{\max }, \qquad \operatorname{for} \| g\|  \text{all of it}"
    )
    block = docstrings.markdown(".. math:: a &= b \\\\\n    c &= d\n", frozenset())
    assert "$$\n\\begin{aligned}\na &= b \\\\\nc &= d\n\\end{aligned}\n$$" in block


def test_slips_are_found_in_prose_and_not_in_code(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_english, "ROOT", tmp_path)
    page, source = tmp_path / "page.md", tmp_path / "source.py"
    page.write_text("One decay a weight, `optimiser`.\n```\nregularise\n```\nplain: ok minimise\n")
    source.write_text('"""Refuse what is no array."""\nnormalise = "one ``a step``"  # w.r.t. x\n')
    assert [line.split(":")[1] for line in plain_english.slips(page)] == ["1"]
    assert [line.split(":")[1] for line in plain_english.slips(source)] == ["1", "2"]


def test_the_guides_read_as_plain_english():
    """`python tests/plain_english.py` reads the rest too."""
    files = sorted((ROOT / "docs").glob("*.md"))
    found = [slip for path in files for slip in plain_english.slips(path)]
    assert files and [slip for slip in found if not slip.startswith("docs/index.md")] == []
