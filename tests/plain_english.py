"""Looks for the commonest slips of English: `python tests/plain_english.py`.

Reads pages, docstrings, comments and messages. Each slip is a pattern with what
to write instead. A line that must keep one (a quotation, a name of another library) ends with
`plain: ok`. Exits 1 and prints one line per slip.
"""

import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "docs/**/*.md",
    "CONTRIBUTING.md",
    "tests/README.md",
    "experiments/README.md",
    "experiments/*/README.md",
)
SOURCES = ("bilevel/**/*.py", "experiments/**/*.py")
KEEP = "plain: ok"

COUNTED = (
    "batch|batches|call|cell|column|decay|decays|derivative|displacement|entries|entry|file|gain|gains|image|"
    "images|key|line|lines|loss|matrix|number|numbers|one|penalty|product|products|"
    "random|rate|row|rows|seconds|step|steps|strength|tangent|value|values|vector|"
    "vectors|weight"
)
PER = (
    "batch|call|channel|class|cycle|dimension|direction|dropout|example|file|group|hyperparameter|image|iteration|layer|"
    "leaf|method|output|parameter|product|row|run|sample|second|seed|sequence|solve|step|tensor|unit|"
    "weight"
)
SLIPS = {
    rf"\b(?:{COUNTED}) an? (?:{PER})\b": "'per', as in 'one per tensor'",
    r"\b\w*(?:diagonalis|discretis|factoris|generalis|initialis|linearis|materialis|maximis|minimis|normalis"
    r"|optimis(?!t)|orthogonalis|parametris|penalis|randomis|recognis|regularis|rematerialis|specialis|stabilis|standardis|symmetris|summaris"
    r"|unregularis|vectoris)\w*": "the spelling with z: optimizer, regularizer, minimize",
    r"\bhas the face of\b": "'is called like'",
    r"\bcounts? as met\b": "'converged'",
    r"\bwhat became of\b": "'the outcome of'",
    r"\bsaid (?:by|when)\b": "'as reported by', 'raised at trace time'",
    r"\bthe step size finds itself\b": "'the step size is estimated automatically'",
    r"\bhypers\b|\bhparam'?s (?:are|is|of)\b": "'hyperparameters', spelt out in prose",
    r"\bw\.r\.t\.|\bin respect to\b|\bafter the parameters\b": "'with respect to'",
    r"\bkill weights\b": "'shrink weights to zero'",
    r"(?<!there )\bis no (?:[a-z]+ )?(?:array|batch|function|leaf|loss|minimum|module|number|tree)"
    r"\b": "'is not a'",
    r"\bare no (?:[a-z]+ )?(?:arrays|numbers|functions|batches)\b": "'are not'",
    r"\bthe (?:floors|roof)\b": "'the package layout', 'top-level tools'",
    r"\blet us\b": "a sentence with a subject",
    r"\bfollowingly\b|\brespectively to\b|\bresp\.": "'respectively'",
    r"\binformations\b|\bdatas\b|\bhardwares\b": "the singular",
    r"\ballows to\b|\benables to\b": "'allows ...ing', 'lets you'",
    r"\bthe so-called\b": "the name itself",
}
PATTERNS = [(re.compile(slip, re.IGNORECASE), instead) for slip, instead in SLIPS.items()]


def prose(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of text: a page without its code, or the strings and comments of a source."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        kept = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        every = text.splitlines()
        lines = []
        for token in tokens:
            if token.type in kept:
                for i, line in enumerate(token.string.splitlines()):
                    lines.append((token.start[0] + i, line, every[token.start[0] + i - 1]))
        return [
            (n, re.sub(r"`+[^`]*`+", "", line)) for n, line, whole in lines if KEEP not in whole
        ]
    fenced, quoted, lines = False, False, []
    for number, line in enumerate(text.splitlines(), 1):
        quoted = line.startswith("|") and (quoted or line.startswith("| instead of"))
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif not fenced and not quoted and KEEP not in line:
            lines.append((number, re.sub(r"`+[^`]*`+|\]\([^)]*\)|\$[^$]*\$", "", line)))
    return lines


def slips(path: Path) -> list[str]:
    """One line per slip of a file."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: write {instead}"
        for number, line in prose(path)
        for pattern, instead in PATTERNS
        for match in pattern.finditer(line)
    ]


def main() -> int:
    files = sorted({path for kind in (*PAGES, *SOURCES) for path in ROOT.glob(kind)})
    found = [line for path in files for line in slips(path)]
    print("\n".join([*found, f"{len(files)} files, {len(found)} slips"]))
    return 1 if found or not files else 0


if __name__ == "__main__":
    sys.exit(main())
