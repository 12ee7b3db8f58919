"""Imports among the experiments have no circle, those inside functions counted as well."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imports(root: Path) -> dict[str, set[str]]:
    """Modules of ``experiments`` under a root, and those of them that each imports."""
    trees = {}
    for path in sorted((root / "experiments").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text("utf-8"))
    graph = {}
    for name, tree in trees.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                within = {f"{node.module}.{alias.name}" for alias in node.names} & trees.keys()
                # What is taken from a package that holds it is that module, not the package.
                found |= within or {node.module}
        graph[name] = found & trees.keys()
    return graph


def test_no_experiment_imports_what_imports_it():
    graph = imports(ROOT)
    assert "experiments.common.budget" in graph["experiments.digits.methods"]
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_a_circle_is_found_also_inside_a_function(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/a.py").write_text("def f():\n    from experiments import b\n")
    (tmp_path / "experiments/b.py").write_text("from experiments.a import f\n")
    with pytest.raises(graphlib.CycleError, match="experiments.a"):
        tuple(graphlib.TopologicalSorter(imports(tmp_path)).static_order())
