"""The data loaders: the messages always, the real sets where BILEVEL_DATA names their folder."""

import functools
import gzip
import hashlib
import http.server
import lzma
import os
import threading

import numpy as np
import pytest

pytest.importorskip("pooch", reason="needs bilevel[experiments]")
pytest.importorskip("sklearn", reason="needs bilevel[experiments]")

from experiments.common import data, files
from experiments.common.data import DataMissing, HashMismatch
from experiments.common.sentences import text

real = pytest.mark.skipif(
    not os.environ.get("BILEVEL_DATA"), reason="set BILEVEL_DATA to the folder of the data sets"
)
MNIST = "mnist/t10k-labels-idx1-ubyte.gz"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data folder, and an empty cache."""
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def known(monkeypatch):
    """Replaces the table of hashes by that of the given contents."""

    def replace(contents):
        table = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        monkeypatch.setattr(files, "hashes", lambda: table)

    return replace


@pytest.fixture
def server(tmp_path):
    """A web server for the files under `tmp_path/site`; gives its address."""
    (tmp_path / "site").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_given_folder_must_have_the_file(nowhere, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(nowhere))
    with pytest.raises(DataMissing) as caught:
        data.mnist()
    said = str(caught.value)
    assert "data set mnist" in said and str(nowhere / "mnist/train-images") in said
    assert "BILEVEL_DATA is set" in said and "https://" in said and "SHA-256" in said


def test_a_set_without_a_public_home_says_where_it_came_from(nowhere):
    with pytest.raises(DataMissing) as caught:
        data.covtype()
    said = str(caught.value)
    assert "data set covtype" in said and "UCI Covertype" in said
    assert str(nowhere / "cache") in said and "BILEVEL_DATA" in said


def test_every_set_has_a_home_or_an_origin():
    folders = {name.split("/")[0] for name in files.hashes()}
    assert folders == set(files.HOMES) | set(files.ORIGINS)
    assert set(files.PLAIN_TEXT) <= set(files.hashes())


def test_other_bytes_are_refused(nowhere, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(nowhere))
    (nowhere / "mnist").mkdir()
    (nowhere / MNIST).write_bytes(b"not mnist")
    found = hashlib.sha256(b"not mnist").hexdigest()
    with pytest.raises(HashMismatch, match=f"{MNIST}.*has SHA-256 {found}, expected f7ae60f92e"):
        files.locate(MNIST)


def test_a_download_is_checked_and_kept(nowhere, server, known, monkeypatch):
    content = gzip.compress(b"labels")
    known({MNIST: content})
    (nowhere / "site/t10k-labels-idx1-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(files, "HOMES", {"mnist": (f"{server}/absent", server)})
    path = files.locate(MNIST)
    assert path == nowhere / "cache" / MNIST and path.read_bytes() == content
    (nowhere / "site/t10k-labels-idx1-ubyte.gz").unlink()
    assert files.locate(MNIST) == path
    assert os.listdir(path.parent) == [path.name]


def test_a_download_with_other_bytes_is_not_kept(nowhere, server, known, monkeypatch):
    known({MNIST: b"the true file"})
    (nowhere / "site/t10k-labels-idx1-ubyte.gz").write_bytes(b"another file")
    monkeypatch.setattr(files, "HOMES", {"mnist": (server,)})
    with pytest.raises(DataMissing, match="could not be downloaded"):
        files.locate(MNIST)
    assert not (nowhere / "cache" / MNIST).exists()


def test_plain_text_is_compressed_to_the_hashed_bytes(nowhere, server, known, monkeypatch):
    name = "wikitext-2/wiki.valid.tokens.xz"
    known({name: lzma.compress(b" = Title = \n", preset=files.XZ_PRESET)})
    (nowhere / "site/valid.txt").write_bytes(b" = Title = \n")
    monkeypatch.setattr(files, "HOMES", {"wikitext-2": (server,)})
    assert lzma.decompress(files.locate(name).read_bytes()) == b" = Title = \n"


def test_unknown_names_are_told_with_the_known_ones():
    for load, known_name in ((data.libsvm, "a9a"), (data.uci_regression, "yacht"), (text, "sst2")):
        with pytest.raises(ValueError, match=f"must be one of .*{known_name}.*, got 'iris'"):
            load("iris")


def test_splits_are_disjoint_complete_and_drawn_by_the_seed():
    parts = data.digits(valid=300, test=200, seed=1)
    assert [len(part.y) for part in parts] == [1297, 300, 200]
    assert parts.train.x.dtype == np.float32 and parts.train.x.shape[1:] == (8, 8)
    assert parts.train.x.min() == 0 and parts.train.x.max() == 1
    rows = np.concatenate([part.x.reshape(-1, 64) for part in parts])
    whole = np.concatenate([part.x.reshape(-1, 64) for part in data.digits(valid=0, test=1)])
    np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(whole.sum(1)))
    assert len(np.unique(rows, axis=0)) == len(np.unique(whole, axis=0))
    np.testing.assert_array_equal(parts.valid.x, data.digits(valid=300, test=200, seed=1).valid.x)
    assert (parts.valid.x != data.digits(valid=300, test=200, seed=2).valid.x).any()
    with pytest.raises(ValueError, match="digits: valid must leave some of the 1297 rows"):
        data.digits(valid=1297)


def test_diabetes_is_split_by_the_seed():
    parts, others = data.diabetes(seed=0), data.diabetes(seed=1)
    assert [part.x.shape for part in parts] == [(242, 10), (100, 10), (100, 10)]
    assert not np.array_equal(parts.test.y, others.test.y)
    assert sum(part.y.sum() for part in parts) == pytest.approx(442 * 152.13348, rel=1e-6)


def test_idx_is_read_by_its_header():
    content = b"\0\0\x08\2" + b"\0\0\0\2" + b"\0\0\0\3" + bytes(range(6))
    np.testing.assert_array_equal(data.parse_idx(content), np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"shape \[2, 3\] cannot hold 5 bytes"):
        data.parse_idx(content[:-1])
    with pytest.raises(ValueError, match="first three bytes"):
        data.parse_idx(b"\x89PNG")


@real
def test_mnist_and_fashion_mnist_have_their_published_statistics():
    for load, mean, std in ((data.mnist, 0.1307, 0.3081), (data.fashion_mnist, 0.2860, 0.3530)):
        parts = load(valid=0)
        assert [part.x.shape for part in parts] == [(60000, 28, 28), (0, 28, 28), (10000, 28, 28)]
        pixels = np.rint(parts.train.x * 255).astype(np.uint8)
        share = np.bincount(pixels.ravel(), minlength=256) / pixels.size
        level = np.arange(256) / 255
        found = share @ level
        # The published values have four digits.
        assert abs(found - mean) < 5e-5
        assert abs(np.sqrt(share @ level**2 - found**2) - std) < 5e-5
        assert len(np.unique(parts.test.y)) == 10


@real
def test_texts_become_tokens_of_the_training_vocabulary():
    tokens = data.ptb()
    assert [len(part) for part in tokens[:3]] == [929589, 73760, 82430]
    assert len(tokens.vocabulary) == 10000 == tokens.train.max() + 1
    words = [tokens.vocabulary[i] for i in tokens.valid[:6]]
    assert words == ["consumers", "may", "want", "to", "move", "their"]
    tokens = data.wikitext2()
    assert [len(part) for part in tokens[:3]] == [2088628, 217646, 245569]
    assert len(tokens.vocabulary) == 33278


@real
def test_newsgroups_are_counts():
    parts = data.newsgroups(valid=0)
    assert parts.train.x.shape == (11314, 130107) and parts.train.x.nnz == 1787565
    assert parts.test.x.shape == (7532, 130107) and parts.test.x.nnz == 1107956


@real
def test_tables_have_their_published_sizes():
    parts = data.libsvm("a9a", valid=1000)
    assert [part.x.shape for part in parts] == [(31561, 123), (1000, 123), (16281, 123)]
    assert np.bincount(parts.test.y).tolist() == [12435, 3846]
    assert [len(part.y) for part in data.libsvm("a1a", valid=5, test=0)] == [1600, 5, 0]
    parts = data.covtype(valid=0, test=0)
    assert np.bincount(parts.train.y).tolist() == [2942, 6022, 2160, 2160, 2396, 2160, 2160]
    parts = data.california_housing(valid=0, test=0)
    assert parts.train.x.shape == (20640, len(data.HOUSING))
    assert parts.train.y.mean() == pytest.approx(2.068558, abs=1e-5)  # Pace and Barry's 206 856
    assert (parts.train.x[:, 0] < -114).all() and (parts.train.x[:, 7] <= 15.0002).all()
    parts = data.parkinsons(valid=0, test=0)
    assert parts.train.x.shape == (5875, 19)
    assert parts.train.y.mean() == pytest.approx(29.019, abs=1e-3)
    first, second = (data.uci_regression("yacht", split=split) for split in (0, 1))
    assert [part.x.shape for part in first] == [(222, 6), (55, 6), (31, 6)]
    assert not np.array_equal(first.test.y, second.test.y)
    with pytest.raises(ValueError, match="split must be 0 to 19, got 20"):
        data.uci_regression("yacht", split=20)


@real
def test_sentences_have_their_published_counts():
    parts = text("sst2")
    assert [np.bincount(part.y).tolist() for part in parts[:3]] == [
        [3310, 3610],
        [428, 444],
        [912, 909],
    ]
    parts = text("trec", valid=0)
    assert parts.classes == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert np.bincount(parts.train.y).tolist() == [86, 1162, 1250, 1223, 835, 896]
    for name, half in (("rt-polarity", 5331), ("subj", 5000)):
        labels = np.concatenate([part.y for part in text(name)[:3]])
        assert np.bincount(labels).tolist() == [half, half]


@real
def test_cifar10_decodes_near_the_lossless_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path))
    # The first 64 images stand for all: decoding everything takes ten seconds.
    arrays = data.load_npz("cifar10/cifar10_jpeg.npz")
    short = {**arrays, "train_offset": arrays["train_offset"][:65]}
    short["test_offset"], short["test_label"] = (
        arrays["test_offset"][:65],
        arrays["test_label"][:64],
    )
    short["train_label"] = arrays["train_label"][:64]
    np.savez(tmp_path / "short.npz", **short)
    true = data.load_npz("cifar10/cifar10_train_first4000_lossless.npz")
    monkeypatch.setattr(data, "locate", lambda name: tmp_path / "short.npz")
    for _ in range(2):  # decoded, then from the cache
        parts = data.cifar10(valid=0)
        assert parts.train.x.shape == (64, 32, 32, 3) and parts.train.x.dtype == np.float32
        # The manifest of the files gives 5.81 of 255 for the first 4000 images.
        error = np.abs(parts.train.x * 255 - true["image"][:64]).mean()
        assert 3 < error < 9
        np.testing.assert_array_equal(parts.train.y, true["label"][:64])
    assert len(os.listdir(tmp_path / "cifar10")) == 2
