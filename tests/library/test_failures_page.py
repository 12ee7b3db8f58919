"""The page *When it goes wrong* explains every status and every message, and no others."""

import re

from failures_page import PAGE, VARIES, covers, messages, patterns, uncovered, unused, weight

from bilevel import Status

TEXT = PAGE.read_text()
FOUND = messages()


def test_every_status_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    missing = [s.name for s in Status if s.name not in rows]
    assert not missing, f"docs/failures.md has no row for {missing}"


def test_every_message_has_an_entry():
    missing = uncovered(TEXT, FOUND)
    assert not missing, "`python tests/failures_page.py` prints them:\n" + "\n".join(
        f"{m.where} {m.text}" for m in missing[:20]
    )


def test_every_entry_has_a_message():
    assert not unused(TEXT, FOUND)


def test_entries_say_something():
    assert not [p for p in patterns(TEXT) if weight(p) < 8]


def test_no_message_is_all_variable():
    """Such a message could not be found on the page, nor by a search."""
    assert not [m for m in FOUND if weight(m.text) < 8]


def test_the_source_is_read_as_it_is_written(tmp_path):
    (tmp_path / "bilevel").mkdir()
    (tmp_path / "bilevel" / "a.py").write_text(
        "def late(x):\n"
        "    return f'No {x} reaches ' + 'it.'\n"
        "def made(error):\n"
        "    return TypeError('made elsewhere')\n"
        "def f(x, y):\n"
        "    raise ValueError(f'`{x}` must be {x + 1}' f' or {y}.' + f'{y}{x}')\n"
        "    raise TypeError(late(x))\n"
        "    raise made(x) from None\n"
        "    raise RuntimeError('not of ours')\n"
    )
    texts = [m.text for m in messages(tmp_path / "bilevel")]
    assert texts == ["`...` must be ... or ....", "No ... reaches it.", "made elsewhere"]


def test_patterns_are_read_from_the_tables():
    page = (
        "| message begins | cause |\n|---|---|\n"
        "| ``... has dtype ...`` | a |\n| `` `inner` must`` or `b \\| c` | d |\n\n"
        "| status | `other` |\n|---|---|\n| `ok` | fine |\n"
    )
    assert patterns(page) == ["... has dtype ...", "`inner` must", "b | c"]
    assert covers("... has dtype ...", f"{VARIES} has dtype {VARIES}, expected a float")
    assert covers("`inner` must", "`inner` must return a scalar")
    assert not covers("must return", "`inner` must return a scalar")  # a message *begins* so
