"""Checks every relative link, anchor and picture of the pages: `python tests/check_docs.py`.

The code blocks are run by the test suite; this script looks at everything else that can rot.
Exits 1 and prints one line a defect.
"""

import re
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FOLDERS = ("docs", "bilevel", "experiments")

FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[`~]*\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s<>]+(?:\([^()\s]*\))?)>?[^)]*\)")
HTML = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']+)[\"']", re.IGNORECASE)
REFERENCE = re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*\s*$", re.MULTILINE)
ANCHOR = re.compile(r"<a\b[^>]*?\b(?:id|name)=[\"']([^\"']+)[\"']", re.IGNORECASE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def pages(root: Path) -> list[Path]:
    """Every Markdown page a reader meets."""
    found = [root / name for name in PAGES if (root / name).exists()]
    for folder in FOLDERS:
        found += sorted((root / folder).rglob("*.md"))
    return found


def anchors(text: str) -> set[str]:
    """The anchors a forge makes of the headings of a page, and those written by hand."""
    prose = FENCE.sub("", text)
    names: set[str] = set(ANCHOR.findall(prose))
    seen: dict[str, int] = {}
    for heading in HEADING.findall(prose):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def links(text: str) -> list[str]:
    """The targets of all links and pictures of a page, code left out."""
    prose = CODE.sub("", FENCE.sub("", text))
    return LINK.findall(prose) + HTML.findall(prose) + REFERENCE.findall(prose)


def check(page: Path, root: Path) -> list[str]:
    """The defects of one page, as lines to print."""
    defects = []
    for target in links(page.read_text(encoding="utf-8")):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = unquote(target).partition("#")
        base = root / path.lstrip("/") if path.startswith("/") else page.parent / path
        goal = base.resolve() if path else page
        where = f"{page.relative_to(root)}: {target}"
        if not goal.is_relative_to(root):
            defects.append(f"{where} leads out of the repository")
        elif not goal.exists():
            defects.append(f"{where} does not exist")
        elif anchor and goal.suffix == ".md":
            if anchor.lower() not in anchors(goal.read_text(encoding="utf-8")):
                defects.append(f"{where} has no such heading")
    return defects


def main(root: Path = ROOT) -> int:
    found = pages(root)
    defects = [line for page in found for line in check(page, root)]
    print("\n".join([*defects, f"{len(found)} pages, {len(defects)} broken links"]))
    return 1 if defects or not found else 0


if __name__ == "__main__":
    sys.exit(main())
