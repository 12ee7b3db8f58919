"""The public face: its names, and what each of them says about itself."""

import dataclasses
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import bilevel

ROOT = Path(__file__).parents[2]

# A snapshot: adding a name is a decision, and so is taking one away.
NAMES = """
Algorithm Anchored BestResponse BestResponseState CG Certificate Composite DatamodelScore Dense
Diagnosis Diagonal DualCG DynamicLanczos EKFAC Evolution FiniteDifference FitResult FixedPoint Free
GaussNewton Hessian HyperSchedule HypergradCheck Hypergradient HypergradientError Hypernetwork
Identity Implicit Indexed Influence InnerState Integer Interval Jacobian KFAC LinearModel
LinearSolution LinearSolver Lineax MemoryReport Metagradient Metasmoothness Minimum Neumann Nystrom
Page Positive Problem Response Root Saga Simplex Space Spider Split Status Stochastic Storm
StructuredResponse Unroll UnrollMap WholeRun Woodbury accumulate alternate amigo bo_rep bome
check_hypergrad complex_momentum datamodel_score descend diagnose f2sa fedhyper_client
fedhyper_global fedhyper_server fit fsla gauss_newton global_response hoag hypergrad hypergrad_init
hypergrad_solve hypergradient_descent influence maid memory_report metagradient metasmoothness
minimize mrbo pbgd proximal_step raise_for_status retraining saba scan_run self_tuning single_loop
soba spaba split_equinox split_linen split_nnx srba stocbio value_and_hypergrad with_response
""".split()


def public():
    return {
        name: getattr(bilevel, name)
        for name in bilevel.__all__
        if not inspect.ismodule(getattr(bilevel, name))
    }


def test_names_are_imported_when_they_are_used():
    """So that importing the package alone costs next to nothing."""
    program = (
        "import sys, bilevel; loaded = [m for m in sys.modules if m.startswith('bilevel.')]; "
        "assert not loaded and 'jax' not in sys.modules, loaded; bilevel.CG, bilevel.prox"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_these():
    assert sorted(public()) == sorted(NAMES)


def test_what_is_shown_is_what_is_public():
    namespaces = {name for name in bilevel.__all__ if inspect.ismodule(getattr(bilevel, name))}
    assert set(bilevel.__all__) - namespaces == set(NAMES)
    assert {"outer", "plot", "prox", "regularizers", "run", "testing"} <= namespaces
    assert {name for name in dir(bilevel) if not name.startswith("_")} == set(bilevel.__all__)
    assert not {"ground", "hypergradient", "problem"} & set(dir(bilevel))


@pytest.mark.parametrize("name", sorted(public()))
def test_every_public_name_is_documented(name):
    value = public()[name]
    doc = inspect.getdoc(value) or ""
    assert len(doc.split()) >= 5, f"{name} has no docstring of its own"
    if dataclasses.is_dataclass(value):
        assert not doc.startswith(f"{name}("), f"the docstring of {name} is the generated one"
    if inspect.isfunction(value):
        missing = [
            p.name
            for p in inspect.signature(value).parameters.values()
            if p.annotation is inspect.Parameter.empty
        ]
        assert not missing, f"{name}: not annotated {missing}"
        assert inspect.signature(value).return_annotation is not inspect.Signature.empty


def methods():
    """Responses and solvers: what a user chooses between by cost and source."""
    return sorted(
        name
        for name, value in public().items()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and (hasattr(value, "vjp") or hasattr(value, "solve"))
    )


def test_the_methods_are_found():
    assert {"CG", "Neumann", "Implicit", "Lineax"} <= set(methods())


# Textbook facts, not somebody's method.
NO_SOURCE = {"Dense"}


@pytest.mark.parametrize("name", methods())
def test_methods_say_cost_and_source(name):
    doc = inspect.getdoc(public()[name]) or ""
    assert "Cost" in doc, f"{name} does not say what it costs"
    if name not in NO_SOURCE:
        assert "Reference" in doc, f"{name} does not say where it comes from"


@pytest.mark.parametrize("name", methods())
def test_methods_are_values(name):
    cls = public()[name]
    assert cls.__dataclass_params__.frozen
    required = [
        f
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if not required:
        value = cls()
        same = jax.tree.unflatten(jax.tree.structure(value), jax.tree.leaves(value))
        assert same == value and hash(value) == hash(same)
        assert not any(isinstance(x, int) for x in jax.tree.leaves(value)), "counts are static"


@pytest.mark.parametrize(
    "name", sorted(n for n, v in public().items() if ">>>" in (inspect.getdoc(v) or ""))
)
def test_examples_run(name):
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):  # the reader's defaults
        for test in finder.find(public()[name], name, globs={}):
            assert test.examples
            runner.run(test)
    assert runner.failures == 0


def test_import_is_light():
    """No extra and no plotting is loaded by ``import bilevel``."""
    code = (
        "import sys, bilevel; heavy = {'lineax', 'equinox', 'matplotlib', 'optuna', 'sklearn', "
        "'orbax', 'rich', 'tensorboardX', 'pooch'} & set(sys.modules); print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", (done.stdout, done.stderr[-2000:])


def test_namespaces_are_there_after_the_import():
    code = (
        "import bilevel; print(bilevel.regularizers.dropout, bilevel.testing.check_algorithm, "
        "bilevel.outer.Info, bilevel.plot.trajectories)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
