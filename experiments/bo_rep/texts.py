"""Sentences as rows of token ids."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from experiments.common.data import Sentences, TextDataset
from experiments.common.sentences import text

PAD, UNKNOWN = 0, 1


class Rows(NamedTuple):
    """``ids`` (n, length) int32, padded in front, and labels ``y``."""

    ids: np.ndarray
    y: np.ndarray


class Corpus(NamedTuple):
    """The parts of a data set, the number of words and of classes."""

    train: Rows
    validation: Rows
    guard: Rows
    test: Rows
    words: int
    classes: int


def load(name: str, *, length: int, words: int, held: float, seed: int) -> Corpus:
    """A sentence set with its ``words - 2`` most frequent training words.

    A fraction ``held`` of the training sentences is drawn by ``seed`` and shared out: half of it is
    the validation part that hypergradients see, half the guard part by which points along a run
    are chosen.
    """
    full = made_up(seed) if name == "made_up" else text(name, valid=0.0, seed=0)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(full.train.y))
    cut = int(held * len(order))
    train, validation, guard = order[cut:], order[: cut // 2], order[cut // 2 : cut]
    counts = Counter(word for i in train for word in _words(full.train.text[i]))
    ids = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(words - 2))}

    def rows(part: Sentences, chosen: np.ndarray) -> Rows:
        encoded = np.stack([_encode(part.text[i], ids, length) for i in chosen])
        return Rows(encoded, part.y[chosen].astype(np.int32))

    everything = np.arange(len(full.test.y))
    return Corpus(
        rows(full.train, train),
        rows(full.train, validation),
        rows(full.train, guard),
        rows(full.test, everything),
        len(ids) + 2,
        len(full.classes),
    )


def _words(sentence: str) -> list[str]:
    return sentence.lower().split()


def _encode(sentence: str, ids: dict[str, int], length: int) -> np.ndarray:
    known = [ids.get(word, UNKNOWN) for word in _words(sentence)][:length]
    return np.array([PAD] * (length - len(known)) + known, np.int32)


def made_up(seed: int, sentences: int = 600) -> TextDataset:
    """Sentences that need no file: each class has words of its own among common ones."""
    draw = np.random.default_rng(seed)

    def part(n: int) -> Sentences:
        y = draw.integers(0, 3, n)
        own = draw.integers(0, 20, (n, 4)) + 100 * (y[:, None] + 1)
        rows = np.concatenate([own, draw.integers(0, 60, (n, 6))], axis=1)
        rows = draw.permuted(rows, axis=1)
        return Sentences(tuple(" ".join(f"w{i}" for i in row) for row in rows), y)

    parts = part(sentences), part(0), part(sentences // 2)
    return TextDataset(*parts, ("a", "b", "c"))
