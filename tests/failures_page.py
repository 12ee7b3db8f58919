"""What ``docs/failures.md`` must explain: every status, and every message the library raises.

In its tables headed *message begins*, a code span is a pattern: ``...`` stands for what varies (a
path, a number), and the rest must be the beginning of a message as the source writes it. One
pattern may cover several messages. ``python tests/failures_page.py`` prints what is missing.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "failures.md"
ERRORS = ("TypeError", "ValueError", "OSError", "ImportError")
VARIES = "..."


class Message(NamedTuple):
    """One ``raise`` of the library: where, and its text with ``...`` for what varies."""

    where: str
    text: str


def messages(library: Path = ROOT / "bilevel") -> list[Message]:
    """Every message of an error that the library raises, in the order of the source."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(library.rglob("*.py"))}
    functions = {
        node.name: node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for text in _raised(node.exc, functions):
                    where = f"{path.relative_to(library.parent)}:{node.lineno}"
                    found.append(Message(where, text))
    return found


def _raised(call: ast.Call, functions: dict[str, ast.FunctionDef]) -> list[str]:
    name = ast.unparse(call.func)
    if name in ERRORS:
        return [_text(call.args[0], functions)] if call.args else [""]
    made = functions.get(name)  # a function that makes the error
    returns = [n.value for n in ast.walk(made) if isinstance(n, ast.Return)] if made else []
    return [t for v in returns if isinstance(v, ast.Call) for t in _raised(v, functions)]


def _text(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> str:
    """The literal parts of a string expression; everything else varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(_text(part, functions) for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = _text(node.left, functions) + _text(node.right, functions)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in functions:
        made = functions[ast.unparse(node.func)]
        returned = [n.value for n in ast.walk(made) if isinstance(n, ast.Return) and n.value]
        text = _text(returned[0], functions) if len(returned) == 1 else VARIES
    else:
        text = VARIES
    return re.sub(r"(\.\.\.)+", VARIES, text)


def patterns(page: str) -> list[str]:
    """The code spans in the first column of the tables headed *message begins*."""
    found, inside = [], False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.lower().startswith("| message begins"):
            inside = True
        elif inside and not re.match(r"\|[\s:|-]+$", line):
            cell = re.split(r"(?<!\\)\|", line)[1].replace(r"\|", "|")
            spans = re.findall(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", cell)
            found += [_unpadded(span) for _, span in spans]
    return found


def _unpadded(span: str) -> str:
    """Markdown takes one space off each end of a code span that begins or ends with a backtick."""
    if span.startswith(" ") and span.endswith(" ") and span.strip():
        return span[1:-1]
    return span.removeprefix(" ") if span.startswith(" `") else span.removesuffix(" ")


def covers(pattern: str, text: str) -> bool:
    """Whether ``text``, as :func:`messages` writes it, begins as ``pattern`` says."""
    regex = ".*?".join(re.escape(part) for part in pattern.split(VARIES))
    return re.match(regex, text, re.DOTALL) is not None


def weight(pattern: str) -> int:
    """Letters of a pattern that say something: one that says nothing covers everything."""
    return len(re.sub(r"[^A-Za-z]", "", pattern))


def uncovered(page: str, found: list[Message]) -> list[Message]:
    """Messages that no pattern of the page covers."""
    known = patterns(page)
    return [m for m in found if not any(covers(p, m.text) for p in known)]


def unused(page: str, found: list[Message]) -> list[str]:
    """Patterns of the page that cover no message: their message was changed or is gone."""
    return [p for p in patterns(page) if not any(covers(p, m.text) for m in found)]


if __name__ == "__main__":
    text, all_messages = PAGE.read_text(), messages()
    missing, stale = uncovered(text, all_messages), unused(text, all_messages)
    for message in missing:
        sys.stdout.write(f"{message.where:<45} {message.text}\n")
    for pattern in stale:
        sys.stdout.write(f"covers no message: {pattern}\n")
    sys.stdout.write(
        f"{len(all_messages)} messages, {len(missing)} without an entry; "
        f"{len(stale)} entries without a message\n"
    )
    sys.exit(bool(missing or stale))
