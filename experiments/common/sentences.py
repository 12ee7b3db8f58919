"""Sentence classification sets: SST-2, TREC questions, movie reviews, subjectivity."""

import lzma

import numpy as np

from experiments.common.data import Sentences, TextDataset, _cut
from experiments.common.files import locate

NAMES = ("sst2", "trec", "rt-polarity", "subj")
POLARITY = ("negative", "positive")
Rows = list[tuple[str, str]]


def _lines(file: str, encoding: str) -> list[str]:
    # Latin-1 text holds control characters that splitlines() would cut at.
    text = lzma.decompress(locate(f"text/{file}.xz").read_bytes()).decode(encoding)
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _sst2(part: str) -> Rows:
    rows = (line.rsplit("\t", 1) for line in _lines(f"sst2_{part}.tsv", "utf-8"))
    return [(sentence, POLARITY[int(label)]) for sentence, label in rows]


def _labelled(file: str, encoding: str) -> Rows:
    """Lines of "label text"; of a label "COARSE:fine" only the coarse class is kept."""
    rows = (line.split(" ", 1) for line in _lines(file, encoding))
    return [(sentence, label.split(":")[0]) for label, sentence in rows]


def text(name: str, *, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> TextDataset:
    """Sentences and int32 labels. `classes` are sorted by name; label i means `classes[i]`.

    SST-2 (Socher et al. 2013) has all its parts; TREC (Li and Roth 2002, six coarse classes) a
    test part; rt-polarity and subj (Pang and Lee 2004, 2005) have neither, so the fractions
    `valid` and `test` of all rows are drawn by `seed`.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if not (0 <= valid and 0 <= test and valid + test < 1):
        raise ValueError(f"valid and test are fractions that leave some rows, got {valid}, {test}")
    validated: Rows | None = None
    tested: Rows | None = None
    if name == "sst2":
        full, validated, tested = _sst2("train"), _sst2("dev"), _sst2("test")
    elif name == "trec":
        # A few questions hold Latin-1 bytes in some editions; every byte decodes that way.
        full = _labelled("trec_train_5500.label", "latin-1")
        tested = _labelled("trec_TREC_10.label", "latin-1")
    elif name == "rt-polarity":
        full = [
            (line, label)
            for label, file in zip(POLARITY, ("rt-polarity.neg", "rt-polarity.pos"), strict=True)
            for line in _lines(file, "latin-1")
        ]
    else:
        full = _labelled("subj.all", "latin-1")
    total = len(full)
    if tested is None:
        rest, drawn = _cut(len(full), int(test * total), seed, name)
        full, tested = [full[i] for i in rest], [full[i] for i in drawn]
    if validated is None:
        rest, drawn = _cut(len(full), int(valid * total), seed + 1, name)
        full, validated = [full[i] for i in rest], [full[i] for i in drawn]
    classes = sorted({label for _, label in full})

    def part(rows: Rows) -> Sentences:
        labels = np.fromiter((classes.index(label) for _, label in rows), np.int32, len(rows))
        return Sentences(tuple(sentence for sentence, _ in rows), labels)

    return TextDataset(part(full), part(validated), part(tested), tuple(classes))
