"""The table of what the default run leaves out: it names what exists, and leaves some of it in."""

import re
from pathlib import Path

from wide import KEPT, left_out

TESTS = Path(__file__).parents[1]


def test_every_entry_names_a_test():
    for file, tests in KEPT.items():
        defined = set(re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE))
        assert tests.keys() <= defined, file


def test_cases_are_kept_evenly_and_others_not_touched():
    file, function = next((f, t) for f, tests in KEPT.items() for t, n in tests.items() if n == 2)
    names = [("library/test_other.py", function), *[(file, function)] * 6, (file, "test_other")]
    assert left_out(names) == [False, False, True, True, False, True, True, False]
    assert left_out(names[:2]) == [False, False]
