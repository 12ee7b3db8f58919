"""The table of mutants still fits the library, and its runner can tell a kill from a survivor.

Running them takes tens of minutes: ``python tests/mutants.py``.
"""

import ast

import mutants as runner
import pytest
from mutations import ROOT, Mutant, all_mutants, path_of

MUTANTS = all_mutants()


def test_there_are_enough_and_their_names_are_unique():
    names = [m.name for m in MUTANTS]
    assert len(names) >= 60
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_applies_and_names_tests_that_exist(mutant: Mutant):
    changed = mutant.apply((ROOT / "bilevel" / mutant.file).read_text())
    ast.parse(changed)  # a syntax error would be "killed" by every test
    assert mutant.old != mutant.new and mutant.means and mutant.tests
    for test in mutant.tests:
        file, *names = path_of(test).split("::")
        text = (ROOT / file).read_text()
        if names:
            assert f"def {names[0].split('[')[0]}(" in text, f"{test} is gone"


def test_the_runner_tells_a_kill_from_a_survivor(tmp_path):
    """On a library of one line, so that nothing is compiled."""
    (tmp_path / "bilevel").mkdir()
    (tmp_path / "tests" / "library").mkdir(parents=True)
    (tmp_path / "bilevel" / "__init__.py").write_text("def twice(x):\n    return x + x\n")
    (tmp_path / "tests" / "library" / "test_it.py").write_text(
        "import bilevel\n\ndef test_two():\n    assert bilevel.twice(2) == 4\n"
    )

    def outcome(old, new, tests=("test_it.py",)):
        mutant = Mutant("m", "__init__.py", old, new, "nothing", tests)
        return runner.judge(mutant, tmp_path, 300)

    tripled = outcome("x + x", "3 * x")
    assert (tripled.verdict, tripled.good) == ("killed", True)
    assert tripled.by == "test_it.py::test_two"
    squared = outcome("x + x", "x * x")  # two times two is two squared
    assert (squared.verdict, squared.good) == ("survived", False)
    explained = squared.mutant._replace(survives="the same number")
    assert squared._replace(mutant=explained).good
    assert not tripled._replace(mutant=explained).good
    assert outcome("x - x", "3 * x").verdict == "does not apply"
    assert outcome("x + x", "3 * x", ("test_it.py::test_three",)).verdict == "no such test"
