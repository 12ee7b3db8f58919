"""Texts for language models: cut to size, with a reduced vocabulary, and as parallel streams."""

from typing import NamedTuple

import numpy as np

from experiments.common import data

UNKNOWN = "<unk>"


class Corpus(NamedTuple):
    """Token ids of the three parts, and the number of words."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    words: int


def load(name: str, words: int | None, sizes: tuple[int | None, int | None, int | None]) -> Corpus:
    """The first ``sizes`` tokens of the parts of a corpus; None takes all.

    Only the ``words - 1`` most frequent words of the training part that is kept stay; every other
    one becomes ``<unk>``. Perplexities are comparable only at equal ``words`` and sizes.
    """
    if name == "markov":
        return markov(words or 50, sizes)
    text = {"ptb": data.ptb, "wikitext2": data.wikitext2}[name]()
    parts = zip((text.train, text.valid, text.test), sizes, strict=True)
    train, valid, test = (part[:size] for part, size in parts)
    if words is None:
        return Corpus(train, valid, test, len(text.vocabulary))
    unknown = text.vocabulary.index(UNKNOWN)
    counts = np.bincount(train, minlength=len(text.vocabulary))
    counts[unknown] = 0
    # A stable sort: equal counts stay in the order of first appearance.
    kept = np.argsort(-counts, kind="stable")[: words - 1]
    new = np.zeros(len(text.vocabulary), np.int32)
    new[kept] = np.arange(1, words)
    return Corpus(new[train], new[valid], new[test], words)


def markov(words: int, sizes: tuple[int | None, int | None, int | None], seed: int = 0) -> Corpus:
    """A made-up text that needs no file: every word has six likely followers."""
    draw = np.random.default_rng(seed)
    followers = draw.integers(0, words, (words, 6))
    chances = np.cumsum(draw.dirichlet(np.ones(6), words), axis=1)
    total = sum(size or 10_000 for size in sizes)
    uniform, ids = draw.uniform(size=total), np.zeros(total, np.int32)
    for i in range(1, total):
        pick = min(int(np.searchsorted(chances[ids[i - 1]], uniform[i])), 5)
        ids[i] = followers[ids[i - 1], pick]
    first, second = sizes[0] or 10_000, (sizes[0] or 10_000) + (sizes[1] or 10_000)
    return Corpus(ids[:first], ids[first:second], ids[second:], words)


def streams(ids: np.ndarray, batch: int) -> np.ndarray:
    """The text as ``batch`` parallel streams ``(batch, length)``; what does not fit is dropped."""
    length = len(ids) // batch
    return ids[: batch * length].reshape(batch, length)
