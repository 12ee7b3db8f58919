"""Docstrings for the site: reStructuredText roles as the library writes them become Markdown."""

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc|ref):`(~?)([\w.]+)`")
MATH = re.compile(r":math:`([^`]*)`")
BLOCK = re.compile(
    r"^(?P<indent>[ ]*)\.\. (?P<kind>math|code-block)::[ ]*(?P<first>[^\n]*)\n"
    r"(?P<rest>(?:(?P=indent)[ ]+\S[^\n]*\n|[ ]*\n(?=(?:[ ]*\n)*(?P=indent)[ ]+\S))*)",
    re.MULTILINE,
)
SECTION = re.compile(
    r"^(?P<name>Args|Attributes|Examples?|Raises|Returns):[ ]*\n"
    r"(?P<body>(?:[ ]+\S[^\n]*\n|[ ]*\n)+)",
    re.MULTILINE,
)
ITEM = re.compile(r"([^\s:`][^:`]*): (.*)")
TITLES = {"Args": "Arguments"}
# What KaTeX typesets otherwise, or not at all; `tests/formulas.py` writes these symbols.
TYPESET = {
    "ᵀ": r"^\top ", "‖": r"\| ", "½": r"\tfrac12 ", "ϵ": r"\epsilon ", "ε": r"\varepsilon ",
    "φ": r"\phi ", "…": r"\ldots ", "∣": r"\mid ", "⊥": r"\perp ", "⨁": r"\bigoplus ",
}  # fmt: skip
FUNCTIONS = ("log", "ln", "max", "min", "cos", "sin", "tanh", "exp")
NAMED = re.compile(
    r"\\(?:text|mathrm|operatorname|mathcal|begin|end)\{[^{}]*\}|\\[A-Za-z]+|([A-Za-z]{3,}|tr)"
)


def typeset(formula: str) -> str:
    """A formula of a docstring as LaTeX: wide gaps, names of functions and a few symbols."""

    def named(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        if match[1] in FUNCTIONS:
            return f"\\{match[1]} "
        return rf"\operatorname{{{match[1]}}}"

    formula = NAMED.sub(named, formula)
    formula = re.sub(r"(?<=\S)[ ]{2,}(?=\S|$)", r" \\qquad ", formula)
    return "".join(TYPESET.get(c, c) for c in formula)


def markdown(text: str, public: frozenset[str]) -> str:
    """The docstring with formulas in dollars, blocks in fences and names as links."""

    def block(match: re.Match[str]) -> str:
        indent, rest = match["indent"], textwrap.dedent(match["rest"]).strip("\n")
        if match["kind"] == "math":
            body = "\n".join(part for part in (match["first"].rstrip(), rest) if part.strip())
            body = "\n".join(typeset(line) for line in body.splitlines())
            body = re.sub(r",\n(?![ ]*(?:&|\\q))", ", \\\\qquad\n", body)
            if r"\\" in body and r"\begin" not in body:
                body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
            lines = ["", "$$", *(line for line in body.splitlines() if line.strip()), "$$", ""]
        else:
            lines = ["", f"```{match['first'].strip()}", *rest.splitlines(), "```", ""]
        return "".join(f"{indent}{line}".rstrip() + "\n" for line in lines)

    def role(match: re.Match[str]) -> str:
        short = match[2].removeprefix("bilevel.")
        last = match[2].rpartition(".")[2] if match[1] else match[2]
        return f"[`{last}`][bilevel.{short}]" if short in public else f"`{last}`"

    text = BLOCK.sub(block, text + "\n")
    text = MATH.sub(lambda m: f"${typeset(m[1].strip())}$", text)
    text = ROLE.sub(role, text)
    return SECTION.sub(_section, text).rstrip()


def _section(match: re.Match[str]) -> str:
    """A section of a docstring as a list, as code, or as paragraphs under its title."""
    name, body = match["name"], textwrap.dedent(match["body"]).strip("\n")
    if name.startswith("Example"):
        body = f"```pycon\n{body}\n```"
    elif name != "Returns":
        lines = []
        for line in body.splitlines():
            item = ITEM.match(line)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else f"  {line}".rstrip())
        body = "\n".join(lines)
    return f"**{TITLES.get(name, name)}**\n\n{body}\n\n"


def default_of(value: Any) -> Any:
    """What a dataclass field is without an argument: `count(100)` is 100 to a reader."""
    match = re.match(r"(?:dataclasses\.)?(?:count|real|field|flag|choice)\(", str(value))
    if value is None or match is None:
        return value
    inside = str(value)[match.end() :]
    named = re.search(r"default=([^,()]+(?:\([^()]*\))?)", inside)
    if named:
        return named[1]
    first = re.match(r"[^,()=]+(?:\([^()]*\))?(?=[,)])", inside)
    return first[0] if first else None


def signature_of(node: Any) -> str:
    """How a dataclass is called, as a block of code; nothing for other classes."""
    if not any("dataclass" in str(decorator.value) for decorator in node.decorators):
        return ""
    lines = []
    for name, field in node.members.items():
        fixed = "instance-attribute" not in field.labels  # a ClassVar
        if field.is_attribute and field.annotation is not None and not fixed and name[0] != "_":
            default = default_of(field.value)
            given = "" if default is None else f" = {default}"
            lines.append(f"    {name}: {field.annotation}{given},")
    body = "\n".join(["", *lines, ""]) if lines else ""
    return f"```python\n{node.name}({body})\n```\n\n"


def unshadow(pkg: Any) -> None:
    """Functions that have the name of their module, as Python imports them.

    After ``from bilevel.outer.alternate import alternate``, ``bilevel.outer.alternate`` is the
    function; griffe takes the module. The module gets another name here.
    """
    modules = [pkg]
    for module in modules:
        modules += [m for m in module.members.values() if not m.is_alias and m.is_module]
    where = [(module.path, module) for module in modules]  # before any has another name
    meant: dict[str, Any] = {}
    hidden = {}
    for path, module in where:
        for name, target in module.imports.items():
            inner = module.members.get(name)
            if inner in modules and target == f"{path}.{name}.{name}":
                meant[f"{path}.{name}"] = inner.members[name]
                hidden[f"{path}.{name}."] = inner
    for prefix, inner in hidden.items():
        name = inner.name
        inner.name = f"{name}_module"
        inner.parent.members[inner.name] = inner
        inner.parent.members[name] = griffe.Alias(name, meant[prefix[:-1]], parent=inner.parent)
    again = True
    while again:  # an alias of an alias of a module
        again = False
        for path, module in where:
            for name, member in list(module.members.items()):
                target, place = member.target_path if member.is_alias else "", f"{path}.{name}"
                if target in meant and place not in meant:  # it may have been resolved already
                    meant[place] = meant[target]
                    module.members[name] = griffe.Alias(name, meant[target], parent=module)
                    again = True
    for _, module in where:
        for member in module.members.values():
            for prefix, inner in hidden.items():
                if member.is_alias and member.target_path.startswith(prefix):
                    member.target_path = f"{inner.path}.{member.target_path.removeprefix(prefix)}"


class Docstrings(griffe.Extension):
    """Rewrites every docstring once the package is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        spaces = {"objectives", "outer", "plot", "prox", "regularizers", "run", "testing"}
        public = frozenset(n for n in pkg.members if not n.startswith("_") and n not in spaces)
        unshadow(pkg)
        self._walk(pkg, public, set())

    def _walk(self, node: Any, public: frozenset[str], seen: set[str]) -> None:
        if node.is_alias or node.path in seen:
            return
        seen.add(node.path)
        if node.docstring is not None:
            node.docstring.value = markdown(node.docstring.value, public)
        if node.is_class and node.docstring is not None:
            node.docstring.value = signature_of(node) + node.docstring.value
        for member in node.members.values():
            self._walk(member, public, seen)
