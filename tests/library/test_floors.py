"""The house stands: imports go down only, files stay short, and some things are not done here."""

import ast
import re
import sys
from pathlib import Path

import pytest
from floor_plan import FLOORS, plan

ROOT = Path(__file__).parents[2]

ORDER = [f"bilevel.{name}" for names in FLOORS.values() for name in names] + ["bilevel"]


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted((ROOT / "bilevel").rglob("*.py"))}
SOURCES = {
    str(p.relative_to(ROOT)): p
    for folder in ("bilevel", "experiments")
    for p in sorted((ROOT / folder).rglob("*.py"))
}


def imported(tree, modules=MODULES):
    """Modules of the package that a file imports anywhere, delayed imports included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return {name for name in found if name in modules}


def parse(path):
    return ast.parse(path.read_text(), str(path))


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(MODULES), "list new modules in FLOORS, remove old ones"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name):
    below = set(ORDER[: ORDER.index(name)])
    upward = imported(parse(MODULES[name])) - below - {name}
    assert not upward, f"{name} imports {sorted(upward)}, which does not stand below it"


def test_the_check_sees_upward_and_delayed_imports():
    delayed = ast.parse("def f():\n    from bilevel.linear import cg\n    import bilevel.problem")
    assert imported(delayed) == {"bilevel.linear.cg", "bilevel.problem"}


def test_the_library_does_not_know_its_experiments_or_tests():
    for name, path in MODULES.items():
        words = {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(parse(path))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not words & {"experiments", "tests"}, name


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_are_short_and_documented(name):
    lines = SOURCES[name].read_text().splitlines()
    assert len(lines) <= 400, f"{name} has {len(lines)} lines: one idea a file"
    assert not lines or ast.get_docstring(parse(SOURCES[name])), f"{name} does not say what it is"


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_what_is_not_done_here(name):
    tree = parse(SOURCES[name])
    text = SOURCES[name].read_text()
    called = set(calls(tree))
    if name.startswith("bilevel/"):
        assert "print" not in called, "the library does not print"
        asserts = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
        assert not asserts, f"bad input is an error with a message, not an assertion: {asserts}"
    assert not any(c.split(".")[-1] == "nan_to_num" for c in called), "NaN is never replaced"
    names = {
        full
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        for full in (alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}",)
    }
    if name.startswith("experiments/"):  # sparse designs are the user's, and nowhere else in JAX
        names = {n for n in names if not n.startswith("jax.experimental.sparse")}
        text = text.replace("from jax.experimental.sparse import", "")
    for word in ("pickle", "dill", "joblib", "jax.experimental", "jax._src"):
        assert not any(n == word or n.startswith(word + ".") for n in names), word
    assert "jax.experimental" not in text and "jax._src" not in text
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert "NotImplementedError" not in text


def test_extras_are_imported_late():
    """``import bilevel`` needs the core dependencies only."""
    core = {"jax", "flax", "lazy_loader", "optax", "numpy", "bilevel"}
    for name, path in MODULES.items():
        for node in parse(path).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    word = alias.name if isinstance(node, ast.Import) else node.module
                    top = (word or "").split(".")[0]

                    assert top in core or top in sys.stdlib_module_names, f"{name}: {top}"


def test_the_floor_plan_is_true_word_for_word():
    """``python tests/floor_plan.py`` writes it anew from the first sentences of the modules."""
    assert (ROOT / "bilevel" / "README.md").read_text() == plan()


LONGEST = {"outer": 80, "run": 80, "hypergradient": 80}
"""Lines of code a function may have, by floor; its docstring does not count."""


def functions(name):
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            first = node.body[0].end_lineno if documented else node.lineno - 1
            yield node.name, node.end_lineno - first


@pytest.mark.parametrize(
    "name", [n for n in sorted(MODULES) if n.split(".")[1:2] and n.split(".")[1] in LONGEST]
)
def test_functions_are_short(name):
    long = {f: n for f, n in functions(name) if n > LONGEST[name.split(".")[1]]}
    assert not long, f"{name}: {long}"
