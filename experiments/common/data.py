"""The data sets of the experiments, as plain functions that return numpy arrays.

Every function returns a small named tuple with train, valid and test parts. Where the publisher
made no validation part, one is drawn from the training part by the explicit `seed`; the test part
is the publisher's, or drawn by the same seed where there is none. Files are found, downloaded and
checked by `files.py`; nothing is ever unpickled.
"""

import bz2
import gzip
import io
import lzma
from typing import Any, NamedTuple

import numpy as np

from experiments.common.files import DataMissing as DataMissing
from experiments.common.files import HashMismatch as HashMismatch
from experiments.common.files import cache_folder, locate, write_whole


class Split(NamedTuple):
    """Inputs and targets of one part; row i of each belongs together."""

    x: Any
    y: np.ndarray


class Dataset(NamedTuple):
    """The three parts of a supervised data set."""

    train: Split
    valid: Split
    test: Split


class Tokens(NamedTuple):
    """A text as one stream of token ids for each part; id i means `vocabulary[i]`."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tuple[str, ...]


class Sentences(NamedTuple):
    """One part of a sentence classification set."""

    text: tuple[str, ...]
    y: np.ndarray


class TextDataset(NamedTuple):
    """The three parts of a sentence classification set, and the names of its classes."""

    train: Sentences
    valid: Sentences
    test: Sentences
    classes: tuple[str, ...]


def _cut(total: int, valid: int, seed: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and validation part of `total` rows, drawn by `seed`."""
    if not 0 <= valid < total:
        raise ValueError(f"{what}: valid must leave some of the {total} rows, got {valid}")
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(order[valid:]), np.sort(order[:valid])


def _dataset(
    full: Split, test: Split | None, *, valid: int, seed: int, what: str, held_out: int = 0
) -> Dataset:
    """Cuts the validation part (and, without one, the test part) out of `full`."""
    if test is None:
        rest, tested = _cut(len(full.y), held_out, seed, what)
        test = Split(full.x[tested], full.y[tested])
        full = Split(full.x[rest], full.y[rest])
    train, validated = _cut(len(full.y), valid, seed + 1, what)
    return Dataset(
        Split(full.x[train], full.y[train]), Split(full.x[validated], full.y[validated]), test
    )


def load_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of a known npz file, for example `load_npz("ecg/ecg200.npz")`."""
    with np.load(locate(name), allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def digits(*, valid: int = 500, test: int = 500, seed: int = 0) -> Dataset:
    """scikit-learn's 1797 digits: float32 (n, 8, 8) in [0, 1], int32 labels. Needs no file."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (np.asarray(images, np.float32) / 16).reshape(-1, 8, 8)
    full = Split(x, np.asarray(labels, np.int32))
    return _dataset(full, None, valid=valid, held_out=test, seed=seed, what="digits")


def parse_idx(content: bytes) -> np.ndarray:
    """The array of an IDX file of bytes: magic 0, 0, 8, rank; sizes as big-endian uint32; data."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of unsigned bytes: its first three bytes must be 0, 0, 8")
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4).astype(np.int64)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if data.size != shape.prod():
        raise ValueError(f"an IDX file of shape {shape.tolist()} cannot hold {data.size} bytes")
    return data.reshape(shape)


def _idx(folder: str, part: str) -> Split:
    def read(kind: str, rank: int) -> np.ndarray:
        path = locate(f"{folder}/{part}-{kind}-idx{rank}-ubyte.gz")
        return parse_idx(gzip.decompress(path.read_bytes()))

    images, labels = read("images", 3), read("labels", 1)
    return Split(images.astype(np.float32) / 255, labels.astype(np.int32))


def mnist(*, valid: int = 10_000, seed: int = 0) -> Dataset:
    """MNIST: float32 (n, 28, 28) in [0, 1], int32 labels; 60000 rows to train, 10000 to test."""
    return _dataset(
        _idx("mnist", "train"), _idx("mnist", "t10k"), valid=valid, seed=seed, what="mnist"
    )


def fashion_mnist(*, valid: int = 10_000, seed: int = 0) -> Dataset:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), as `mnist`."""
    full, test = _idx("fashion_mnist", "train"), _idx("fashion_mnist", "t10k")
    return _dataset(full, test, valid=valid, seed=seed, what="fashion_mnist")


def _decoded_cifar10(part: str) -> np.ndarray:
    """The uint8 images of one part, decoded once and kept in the cache as an npy."""
    import PIL
    from PIL import Image

    # Decoders differ by a level or so; a cache made by another Pillow is another cache.
    kept = cache_folder() / "cifar10" / f"{part}_pillow_{PIL.__version__}.npy"
    if kept.exists():
        return np.load(kept, mmap_mode="r", allow_pickle=False)
    with np.load(locate("cifar10/cifar10_jpeg.npz"), allow_pickle=False) as stored:
        header = stored["jpeg_header"].tobytes()
        scan, offset = stored[f"{part}_scan"].tobytes(), stored[f"{part}_offset"]
    images = np.empty((len(offset) - 1, 32, 32, 3), np.uint8)
    for i, (start, stop) in enumerate(zip(offset[:-1], offset[1:], strict=True)):
        with Image.open(io.BytesIO(header + scan[start:stop])) as image:
            images[i] = np.asarray(image.convert("RGB"))
    write_whole(kept, lambda partial: np.save(partial, images))
    return images


def cifar10(*, valid: int = 5_000, seed: int = 0, lossless: bool = False) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): float32 (n, 32, 32, 3) in [0, 1], int32 labels.

    The 50000 + 10000 images are JPEGs of quality 75: results on them are not results on CIFAR-10
    proper and must say so. `lossless=True` trains on the first 4000 training images, of which the
    true pixels are there; its test part is still JPEG.
    """
    arrays = load_npz("cifar10/cifar10_jpeg.npz")
    test = Split(_pixels(_decoded_cifar10("test")), arrays["test_label"].astype(np.int32))
    if lossless:
        stored = load_npz("cifar10/cifar10_train_first4000_lossless.npz")
        full = Split(_pixels(stored["image"]), stored["label"].astype(np.int32))
    else:
        full = Split(_pixels(_decoded_cifar10("train")), arrays["train_label"].astype(np.int32))
    return _dataset(full, test, valid=valid, seed=seed, what="cifar10")


def _pixels(images: np.ndarray) -> np.ndarray:
    return np.divide(images, 255, dtype=np.float32)


def _language_model(folder: str, files: str) -> Tokens:
    """Each line's words and an end-of-sentence; ids in the order of first appearance in train."""
    ids: dict[str, int] = {}
    streams = []
    for part in ("train", "valid", "test"):
        text = lzma.decompress(locate(f"{folder}/{files.format(part)}").read_bytes()).decode()
        words = [word for line in text.splitlines() for word in (*line.split(), "<eos>")]
        if part == "train":
            ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
        streams.append(np.fromiter((ids[word] for word in words), np.int32, len(words)))
    train, valid, test = streams
    return Tokens(train, valid, test, tuple(ids))


def ptb() -> Tokens:
    """Penn Treebank, Mikolov's preprocessing: 929589 + 73760 + 82430 tokens, 10000 words."""
    return _language_model("ptb", "ptb.{}.txt.xz")


def wikitext2() -> Tokens:
    """WikiText-2 (Merity et al. 2016): 2088628 + 217646 + 245569 tokens, 33278 words."""
    return _language_model("wikitext-2", "wiki.{}.tokens.xz")


def newsgroups(*, valid: int = 2_000, seed: int = 0) -> Dataset:
    """20 newsgroups by date: float32 term counts as scipy CSR (n, 130107), int32 labels."""
    from scipy.sparse import csr_matrix

    def part(name: str) -> Split:
        stored = load_npz(f"20newsgroups/20news_bydate_{name}_counts.npz")
        counts = stored["data"].astype(np.float32), stored["indices"], stored["indptr"]
        x = csr_matrix(counts, shape=tuple(stored["shape"].tolist()))
        return Split(x, stored["target"].astype(np.int32))

    return _dataset(part("train"), part("test"), valid=valid, seed=seed, what="newsgroups")


LIBSVM = ("a1a", "a9a", "ijcnn1", "mushrooms", "w8a")


def libsvm(
    name: str, *, valid: int | None = None, test: int | None = None, seed: int = 0
) -> Dataset:
    """A LIBSVM classification set: float32 (n, d), labels 0 .. k-1 in the order of the file's.

    a9a comes with its own test part; of the others a fifth is drawn for it. By default a quarter
    of what remains is the validation part.
    """
    from sklearn.datasets import load_svmlight_file

    if name not in LIBSVM:
        raise ValueError(f"name must be one of {', '.join(LIBSVM)}, got {name!r}")

    def read(file: str, features: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        content = io.BytesIO(bz2.decompress(locate(f"libsvm/{file}.bz2").read_bytes()))
        x, y = load_svmlight_file(content, n_features=features)[:2]
        return np.asarray(x.toarray(), np.float32), y

    x, y = read(name)
    classes, labels = np.unique(y, return_inverse=True)
    full, tested = Split(x, labels.astype(np.int32)), None
    held_out = len(y) // 5 if test is None else test
    if name == "a9a":
        x, y = read("a9a.t", x.shape[1])
        tested, held_out = Split(x, np.searchsorted(classes, y).astype(np.int32)), 0
    valid = (len(full.y) - held_out) // 4 if valid is None else valid
    return _dataset(full, tested, valid=valid, held_out=held_out, seed=seed, what=f"libsvm {name}")


UCI = ("bostonHousing", "concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")


def uci_regression(name: str, *, split: int = 0, valid: float = 0.2, seed: int = 0) -> Dataset:
    """A UCI regression set, float64, in one of the 20 published 90/10 splits.

    (Hernandez-Lobato and Adams, Probabilistic Backpropagation, 2015.) `valid` is the fraction of
    the training part to validate on. Nothing is standardized: use the training part's statistics.
    """
    if name not in UCI:
        raise ValueError(f"name must be one of {', '.join(UCI)}, got {name!r}")
    if split not in range(20):
        raise ValueError(f"split must be 0 to 19, got {split!r}")
    if not 0 <= valid < 1:
        raise ValueError(f"valid is a fraction of the training part, in [0, 1), got {valid!r}")
    stored = load_npz(f"uci_regression/{name}.npz")
    train, test = stored["train_index"][split], stored["test_index"][split]
    full = Split(stored["X"][train], stored["y"][train])
    tested = Split(stored["X"][test], stored["y"][test])
    return _dataset(full, tested, valid=int(valid * len(train)), seed=seed, what=f"uci {name}")


def covtype(*, valid: int = 4_000, test: int = 4_000, seed: int = 0) -> Dataset:
    """The first 20000 records of UCI Covertype: float32 (n, 54), int32 labels 0 .. 6."""
    text = gzip.decompress(locate("covtype/covtype.20k.data.gz").read_bytes()).decode()
    table = np.loadtxt(io.StringIO(text), np.float32, delimiter=",")
    full = Split(table[:, :-1], table[:, -1].astype(np.int32) - 1)
    return _dataset(full, None, valid=valid, held_out=test, seed=seed, what="covtype")


HOUSING = (
    "longitude",
    "latitude",
    "age",
    "rooms",
    "bedrooms",
    "population",
    "households",
    "income",
)


def california_housing(*, valid: int = 2_000, test: int = 2_000, seed: int = 0) -> Dataset:
    """California housing (Pace and Barry 1997): float64 (n, 8) in the order of `HOUSING`.

    The columns of the census as they are (sums over a block, not scikit-learn's averages); the
    target is the median house value in 100 000 dollars.
    """
    path = locate("california_housing/cal_housing.data.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    table = np.loadtxt(io.StringIO(text), np.float64, delimiter=",", skiprows=1)
    full = Split(table[:, :-1], table[:, -1] / 1e5)
    return _dataset(full, None, valid=valid, held_out=test, seed=seed, what="california_housing")


def diabetes(*, valid: int = 100, test: int = 100, seed: int = 0) -> Dataset:
    """scikit-learn's diabetes (Efron et al. 2004): 442 rows, float64 (n, 10). Needs no file."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    full = Split(np.asarray(x, np.float64), np.asarray(y, np.float64))
    return _dataset(full, None, valid=valid, held_out=test, seed=seed, what="diabetes")


def parkinsons(*, valid: int = 600, test: int = 600, seed: int = 0) -> Dataset:
    """UCI Parkinsons Telemonitoring (Tsanas and Little 2009): float64 (n, 19), total UPDRS.

    Age, sex, time and 16 measures of the voice. Rows of one subject lie in all parts.
    """
    path = locate("parkinsons_telemonitoring/parkinsons_updrs.data.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    table = np.loadtxt(io.StringIO(text), np.float64, skiprows=1)
    # The columns left out: the subject, and the two scores.
    full = Split(np.delete(table, (0, 4, 5), axis=1), table[:, 5])
    return _dataset(full, None, valid=valid, held_out=test, seed=seed, what="parkinsons")
