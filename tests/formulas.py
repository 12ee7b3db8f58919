r"""Formulas of docstrings as a terminal can show them: `python tests/formulas.py [--write]`.

`help(bilevel.CG)` shows a docstring as it is, so its formulas are written in symbols, as far as
these go: `∇_w h(w, λ)`, not `\nabla_w h(w, \lambda)`. The site typesets both (`typeset` in
`docs/site/docstrings.py`). Without `--write`, prints the files that could be plainer and exits 1.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYMBOLS = {
    "lambda": "λ", "rho": "ρ", "sigma": "σ", "phi": "φ", "varphi": "φ", "epsilon": "ϵ", "mu": "μ",
    "alpha": "α", "beta": "β", "tau": "τ", "nu": "ν", "delta": "δ", "eta": "η", "theta": "θ",
    "varepsilon": "ε", "kappa": "κ", "pi": "π", "gamma": "γ", "omega": "ω", "xi": "ξ",
    "Delta": "Δ", "Omega": "Ω", "Lambda": "Λ", "ell": "ℓ", "nabla": "∇", "partial": "∂",
    "sum": "∑", "leftarrow": "←", "mapsto": "↦", "to": "→", "le": "≤", "ge": "≥", "ne": "≠",
    "sim": "∼", "approx": "≈", "in": "∈", "notin": "∉", "infty": "∞", "pm": "±", "cdot": "·",
    "otimes": "⊗", "odot": "⊙", "circ": "∘", "langle": "⟨", "rangle": "⟩", "lfloor": "⌊",
    "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "mid": "∣", "ldots": "…", "dots": "…",
    "succeq": "⪰", "perp": "⊥", "bigoplus": "⨁",
    "log": "log", "ln": "ln", "max": "max", "min": "min", "cos": "cos", "sin": "sin",
    "tanh": "tanh",
}  # fmt: skip
PREFIXES = "∇∂⟨⌊⌈"  # nothing between them and what follows
SIZES = ("bigl", "bigr", "Bigl", "Bigr", "Big", "left", "right")
WORD = re.compile(r"\\(?:operatorname|mathrm|text)\{([A-Za-z]{3,}|E|tr)\}")
RATIO = re.compile(
    r"(?<![A-Za-z][ ])(?<![A-Za-z])"
    r"\\t?frac(?:\{([^{}\s]{1,3})\}\{([^{}\s]{1,3})\}|[ ]?([A-Za-z1])([A-Za-z]))"
)
COMMAND = re.compile(r"[ ]?\\q?quad(?![A-Za-z])[ ]*|\\([A-Za-z]+)(?![A-Za-z])([ ]?)")
INLINE = re.compile(r"(:math:`)([^`]*)(`)")
BLOCK = re.compile(
    r"^((?P<indent>[ ]*)\.\. math::[ ]*)"
    r"([^\n]*\n(?:(?P=indent)[ ]+\S[^\n]*\n|[ ]*\n(?=(?:[ ]*\n)*(?P=indent)[ ]+\S))*)()",
    re.MULTILINE,
)


def plain(formula: str) -> str:
    """A formula of LaTeX in symbols; what has none stays as it is."""
    formula = re.sub(r"\^\\top(?![A-Za-z])|\^\{\\top\}", "ᵀ", formula).replace(r"\|", "‖")
    formula = re.sub(r"\\tfrac12(?!\d)[ ]?", "½ ", formula)
    formula = re.sub(r"(?<=\S)[ ]?\\[,;](?=[ ]?\S)[ ]?", " ", formula)
    formula = re.sub(r"\\[,;](?=\n)|(?<=\n)([ ]*)\\q?quad(?![A-Za-z])[ ]*", r"\1", formula)

    def symbol(match: re.Match[str]) -> str:
        if match[1] is None:
            return "  "
        if match[1] not in SYMBOLS:
            return match[0]
        found, gap = SYMBOLS[match[1]], match[2]
        if found in PREFIXES:
            gap = ""
        after = formula[match.end() : match.end() + 1]
        if found.isalpha() and found.isascii() and (after.isalpha() or after == "\\"):
            gap = " "
        return found + gap

    formula = WORD.sub(r"\1", COMMAND.sub(symbol, formula))
    formula = RATIO.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]} ", formula)
    if r"\frac" not in formula and "∑" not in formula:
        formula = re.sub(rf"\\(?:{'|'.join(SIZES)})(?![A-Za-z])", "", formula)
    formula = re.sub(r"(\\[A-Za-z]+)(?=[^\x00-\x7f])", r"\1 ", formula)
    formula = re.sub(r"(/[^{}\s]{1,3}) (?=[ )\],.;^&]|$)", r"\1", formula)
    # A gap between two lines is the site's to make: it follows a comma.
    return re.sub(r"[ ]+(?=\n)|(?<=½)[ ](?=[)\],])|[ ](?=[⟩⌋⌉])", "", formula)


def rewritten(source: str) -> str:
    """A module with the formulas of its docstrings in symbols."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            continue
        if not ast.get_docstring(node):
            continue
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno or 0
        text = "".join(lines[first:last])
        if not re.match(r'\s*r"""', text):
            continue
        for kind in (BLOCK, INLINE):
            groups = (1, 3) if kind is BLOCK else (1, 2)
            text = kind.sub(lambda m, g=groups: m[g[0]] + plain(m[g[1]]) + m[g[1] + 1], text)
        new = text.splitlines(keepends=True)
        if len(new) == last - first:
            lines[first:last] = new
    return "".join(lines)


def main(arguments: list[str]) -> int:
    found = []
    for path in sorted((ROOT / "bilevel").rglob("*.py")):
        source = path.read_text("utf-8")
        new = rewritten(source)
        if new != source:
            found.append(path.relative_to(ROOT).as_posix())
            if "--write" in arguments:
                path.write_text(new, "utf-8")
    print("\n".join([*found, f"{len(found)} files have formulas that could be plainer"]))
    return 1 if found and "--write" not in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
