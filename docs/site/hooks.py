"""What mkdocs adds to docs/: pages that live elsewhere in the checkout, and those made from it.

- README, CONTRIBUTING, CHANGELOG and the pages of the experiments become pages of the site;
- a link to a source file leads to a page that shows it;
- the gallery is every committed picture of the experiments, with its command;
- a public name that no page under docs/api has is put on `api/more.md`;
- a page of docs/ that `mkdocs.yml` does not name is added to Guides.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOVED = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bilevel/README.md": "floor_plan.md",
    "experiments/README.md": "papers/index.md",
    "tests/README.md": "tests.md",
}
NAMESPACES = ("objectives", "outer", "plot", "regularizers", "regularizers.prox", "run", "testing")
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^()\s]+)((?:\s+\"[^\"]*\")?\))")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)\s*$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[([^\]]*)\]\((results/[^)\s]+\.png)\)")


def address(path: str) -> str:
    """Where a file of the checkout is on the site (a path below docs/)."""
    if path in MOVED:
        return MOVED[path]
    parts = path.split("/")
    if parts[0] == "docs":
        return "/".join(parts[1:])
    if parts[0] == "experiments" and len(parts) > 2:
        if parts[2] == "README.md":
            return f"papers/{parts[1]}.md"
        if path.endswith(".png"):
            return f"papers/{parts[1]}/{parts[-1]}"
    return f"source/{path}.md"


def target(path: Path) -> Path:
    """What a link to a folder means."""
    if path.is_dir():
        for name in ("README.md", "__init__.py"):
            if (path / name).exists():
                return path / name
    return path


def relinked(text: str, page: str, url: str) -> tuple[str, set[str]]:
    """A page of the checkout with its links as they are on the site, and the files it shows."""
    needed: set[str] = set()

    def link(match: re.Match[str]) -> str:
        goal, _, anchor = match[2].partition("#")
        if not goal or re.match(r"[a-z][a-z0-9+.-]*:", goal):
            return match[0]
        found = target(Path(os.path.normpath(ROOT / page / ".." / goal)))
        if not found.is_file() or not found.is_relative_to(ROOT):
            return match[0]
        path = found.relative_to(ROOT).as_posix()
        needed.add(path)
        to = os.path.relpath(address(path), os.path.dirname(url) or ".")
        return f"{match[1]}{to}{'#' + anchor if anchor else ''}{match[3]}"

    pieces, last = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(link, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*pieces, LINK.sub(link, text[last:])]), needed


def title_of(text: str, default: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else default


def experiments() -> list[Path]:
    """The pages of the experiments, in the order of their names."""
    return sorted((ROOT / "experiments").glob("*/README.md"))


def gallery() -> str:
    """Every committed picture of the experiments, under the command that makes it."""
    lines = [
        "# Gallery",
        "",
        "Every picture is drawn from saved records by the command above it, and says what was",
        "measured. The pages of the experiments have the numbers and what fell short.",
        "",
    ]
    for page in experiments():
        text = page.read_text("utf-8")
        shown = dict((path, alt) for alt, path in PICTURE.findall(text))
        pictures = sorted(page.parent.glob("results/*.png"))
        if not pictures:
            continue
        name = page.parent.name
        claim = next(line for line in text.splitlines()[1:] if line.strip())
        lines += [f"## {name}", "", f"{claim} [The experiment](papers/{name}.md).", ""]
        lines += ["```sh", f"python -m experiments run {name} --preset cpu", "```", ""]
        for picture in pictures:
            alt = shown.get(f"results/{picture.name}", picture.stem.replace("_", " "))
            lines += [f"![{alt}](papers/{name}/{picture.name})", ""]
    return "\n".join(lines) + "\n"


def api_names() -> set[str]:
    """The public names: those of `bilevel`, and of its namespaces with a prefix."""
    import ast

    found = set()
    for space in ("", *NAMESPACES):
        folder = ROOT / "bilevel" / space.replace(".", "/")
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if not file.exists():
            continue
        tree = ast.parse(file.read_text("utf-8"))
        prefix = f"{space}." if space else ""
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {prefix + a.name for a in node.names if a.asname == a.name}
            elif space and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if file.name != "__init__.py" and not node.name.startswith("_"):
                    found.add(prefix + node.name)
    top = {name for name in found if "." not in name} - {*NAMESPACES, "prox"}
    spaced = {name for name in found if "." in name and name.rpartition(".")[2] not in top}
    return top | (spaced - {"regularizers.prox"})


def listed() -> set[str]:
    """The names that the pages under docs/api have."""
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    return set(re.findall(r"^::: bilevel\.([\w.]+)$", text, re.MULTILINE))


def more() -> str:
    """The names that stand on no page of their own."""
    rest = sorted(api_names() - listed())
    lines = ["# More", "", "Public names that no other page of the API has.", ""]
    return "\n".join(lines + [f"::: bilevel.{name}\n" for name in rest]) + "\n"


def extra_pages() -> dict[str, str]:
    """Address on the site and path in the checkout of the pages that docs/ does not hold."""
    pages = {address(path): path for path in MOVED if (ROOT / path).exists()}
    pages |= {
        address(p.relative_to(ROOT).as_posix()): p.relative_to(ROOT).as_posix()
        for p in experiments()
    }
    return pages


def on_config(config: Any) -> Any:
    """Pages of docs/ that the navigation does not name go to Guides; experiments to theirs."""
    named = str(config["nav"])
    sections = {next(iter(entry)): entry for entry in config["nav"]}
    guides = sections["Guides"]["Guides"]
    for page in sorted((ROOT / "docs").glob("*.md")):
        if f"'{page.name}'" not in named:
            guides.append(page.name)
    pages = ["papers/index.md", *(f"papers/{p.parent.name}.md" for p in experiments())]
    sections["Experiments"]["Experiments"] += pages
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that are not under docs/."""
    from mkdocs.structure.files import File

    contents = {"gallery.md": gallery(), "api/more.md": more()}
    needed: set[str] = set()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        path = page.relative_to(ROOT).as_posix()
        needed |= relinked(page.read_text("utf-8"), path, address(path))[1]
    for url, path in extra_pages().items():
        text, more_needed = relinked((ROOT / path).read_text("utf-8"), path, url)
        needed |= more_needed
        contents[url] = text
    for picture in sorted((ROOT / "experiments").glob("*/results/*.png")):
        url = address(picture.relative_to(ROOT).as_posix())
        files.append(File.generated(config, url, abs_src_path=str(picture)))
    for path in sorted(needed):
        if address(path).startswith("source/"):
            language = {".py": "python", ".json": "json"}.get(Path(path).suffix, "text")
            code = (ROOT / path).read_text("utf-8")
            contents[address(path)] = (
                f"---\nsearch:\n  exclude: true\n---\n# `{path}`\n\n````{language}\n{code}\n````\n"
            )
    for url, text in contents.items():
        files.append(File.generated(config, url, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Pages of docs/ link to files outside it: to their places on the site."""
    url = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return relinked(markdown, f"docs/{url}", url)[0]
