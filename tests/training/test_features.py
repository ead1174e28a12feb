"""Features on disk: the same bits, of the same images, network and machine, or made again; and private."""

import dataclasses
import os
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
import shared_runs

from dpnb import cache, experiments
from dpnb.data import Dataset, Split
from dpnb.training import features

EXPERIMENT = experiments.get("cifar10/scatter-linear/eps1", "smoke")


class Means:
    """A fixed transform like `dpnb.models.scattering`: the mean of each row of pixels."""

    WORDS = "means of the rows"

    @staticmethod
    def make_transform(side):
        return jax.jit(lambda pixels: pixels.astype("float32").mean(2).reshape(len(pixels), side * 3))


def prepare(data):
    return features._fixed(data, Means)


def images(n, seed=0):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
    return Split(pixels, np.arange(n) % 10)


def dataset(seed=0, note=""):
    return Dataset("cifar10", images(30, seed), images(7, seed + 1), tuple(map(str, range(10))), note)


@pytest.fixture
def large(disk_cache, monkeypatch):
    """Features of any size are kept."""
    monkeypatch.setattr(features, "KEPT", 0)
    forget()
    yield
    forget()


@pytest.fixture
def made(monkeypatch):
    """How many images each call of `extract` read."""
    counted, real = [], features.extract
    monkeypatch.setattr(
        features, "extract", lambda t, split, *rest: counted.append(len(split)) or real(t, split, *rest)
    )
    return counted


def forget():
    features._fixed.cache_clear()
    features._extracted.cache_clear()


def same(a, b):
    for x, y in ((a.train, b.train), (a.test, b.test)):
        assert x.images.dtype == y.images.dtype == np.float32 and x.images.tobytes() == y.images.tobytes()
        assert x.labels.dtype == y.labels.dtype == np.int32 and x.labels.tolist() == y.labels.tolist()
        assert not (x.images.flags.writeable or x.labels.flags.writeable)
    assert (a.name, a.classes, a.note, a.transform) == (b.name, b.classes, b.note, b.transform)
    assert a.fingerprint == b.fingerprint


def test_they_are_made_once_and_are_the_same_to_the_bit(large, made):
    with cache.unused():
        computed = prepare(dataset(note="a caveat"))
    assert not cache.entries()
    forget()
    first = prepare(dataset(note="a caveat"))
    forget()
    second = prepare(dataset(note="a caveat"))
    assert made == [30, 7] * 2
    same(computed, first)
    same(computed, second)
    (entry,) = cache.entries()
    assert (entry.kind, entry.what) == ("features", "features of cifar10: means of the rows")
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.path.iterdir()} == {0o600}
    assert stat.S_IMODE(entry.path.parent.stat().st_mode) == 0o700


@pytest.mark.slow
def test_scattering_features_are_the_same_to_the_bit(large, made, monkeypatch):
    shared_runs.optimise_scattering(monkeypatch)
    first = features.prepare(EXPERIMENT, dataset())
    forget()
    same(first, features.prepare(EXPERIMENT, dataset()))
    assert made == [30, 7]


def test_other_images_code_or_machine_are_made_again(large, made, monkeypatch):
    prepare(dataset())
    prepare(dataset(seed=5))
    assert len(made) == 4
    monkeypatch.setattr(cache, "code", lambda *_: "another")
    forget()
    prepare(dataset())
    assert len(made) == 6
    monkeypatch.setattr(features, "rounding", lambda _: {"cpu": "another"})
    forget()
    prepare(dataset())
    assert len(made) == 8
    forget()
    prepare(dataset())
    assert len(made) == 8


def test_labels_of_photographs_that_cannot_be_read_are_kept():
    class Unreadable(Split):
        def batches(self, size):
            for pixels, labels in super().batches(size):
                yield pixels, np.where(labels == 3, -1, labels)

    into = np.zeros((12, 2), np.float32), np.zeros(12, np.int32)
    split = Unreadable(images(12).images, np.arange(12) % 10)
    got = features.extract(lambda x: x.reshape(len(x), -1)[:, :2].astype(np.float32), split, 5, into)
    assert got.labels.tolist() == into[1].tolist() == [0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 0, 1]
    np.testing.assert_array_equal(into[0], split.images.reshape(12, -1)[:, :2])


def test_an_interrupted_making_leaves_nothing(large, monkeypatch):
    real = features.extract

    def interrupted(transform, split, *rest):
        real(transform, split, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(dataset())
    assert not cache.entries() and not [*cache.folder().rglob("*.npy")]
    prepare(dataset())
    assert len(cache.entries()) == 1


def test_a_damaged_entry_is_made_again(large, made):
    first = prepare(dataset())
    expected = first.train.images.copy()
    (path,) = cache.entries()[0].path.glob("train_features.npy")
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    forget()
    again = prepare(dataset())
    assert len(made) == 4
    np.testing.assert_array_equal(again.train.images, expected)


def test_small_ones_stay_in_memory(disk_cache, made):
    forget()
    prepare(dataset())
    forget()
    prepare(dataset())
    assert made == [30, 7] * 2 and not cache.entries()
    forget()


def test_the_key_tells_every_way_in_which_features_differ():
    """A recipe, a size, an order of the images, a network or its weights: each another key."""
    data = dataset()
    turned = dataclasses.replace(data, train=Split(data.train.images[::-1], data.train.labels[::-1]))
    keys = [
        features._key(data, "words", 500),
        features._key(data, "other words", 500),
        features._key(data, "words", 250),
        features._key(turned, "words", 500),
        features._key(dataclasses.replace(data, test=data.test.head(3)), "words", 500),
    ]
    assert len({str(key) for key in keys}) == len(keys)
    assert str(features._key(dataset(), "words", 500)) == str(keys[0])
    assert cache.code(*features.CODE)


def test_the_key_is_the_same_in_another_process():
    code = "import sys; sys.path[:0] = ['tests', 'tests/training']; import test_features as t; "
    code += "print(t.features._key(t.dataset(), 'words', 500))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(features._key(dataset(), "words", 500))


def test_a_bar_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setenv("DPNB_PROGRESS", "bar")
    features.extract(lambda x: x[..., 0].astype(np.float32), images(12), 5)
    assert "12/12" in capsys.readouterr().err
    monkeypatch.setenv("DPNB_PROGRESS", "plain")
    features.extract(lambda x: x[..., 0].astype(np.float32), images(12), 5)
    assert not capsys.readouterr().err
