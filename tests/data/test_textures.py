"""Random images: the same on every call, of classes that their structure tells apart and their colours do not."""

import jax
import numpy as np
import pytest

from dpnb.data import textures

CLASSES = 24


@pytest.fixture(scope="module")
def made():
    return textures.dataset(CLASSES, train=30 * CLASSES, test=2 * CLASSES)


def test_shapes_names_and_labels(made):
    assert made.train.images.shape == (30 * CLASSES, 32, 32, 3) and made.train.images.dtype == np.uint8
    assert made.classes[:4] == ("dead leaves 0", "random phase 0", "wavelets 0", "dead leaves 1")
    assert (np.bincount(made.train.labels) == 30).all() and (np.bincount(made.test.labels) == 2).all()
    assert "nobody's data" in made.note


def test_every_image_is_new_and_uses_the_range(made):
    images = np.concatenate([made.train.images, made.test.images])
    assert len({image.tobytes() for image in images}) == len(images)
    spread = images.reshape(len(images), -1).std(1)
    assert (spread > 1).mean() > 0.98 and 20 < np.median(spread) < 90
    # Neither too dark nor washed out, and few pixels beyond the range.
    assert 90 < images.mean() < 165 and np.isin(images, (0, 255)).mean() < 0.2


def test_the_same_again_whatever_the_number(made):
    again = textures.dataset(CLASSES, train=2 * CLASSES, test=CLASSES)
    np.testing.assert_array_equal(again.train.images, made.train.images[: 2 * CLASSES])
    other = textures.dataset(CLASSES, train=2 * CLASSES, test=CLASSES, seed=1)
    assert (other.train.images != again.train.images).mean() > 0.9


def power(images):
    """Logarithm of the power over direction and frequency: structure without place and colour."""
    grey = images.astype(np.float32).mean(-1)
    spectrum = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True)))[:, :17, :]
    return np.log(spectrum + 1).reshape(len(images), -1)


def colour(images):
    return images.astype(np.float32).mean((1, 2))


def accuracy(features, made):
    """Of the nearest class mean over the training images, for the other images."""
    train, test = features(made.train.images), features(made.test.images)
    train, test = (x / train.std(0) for x in (train, test))
    means = np.stack([train[made.train.labels == c].mean(0) for c in range(CLASSES)])
    guesses = np.square(test[:, None] - means).sum(-1).argmin(1)
    return np.mean(guesses == made.test.labels)


def test_structure_tells_the_class_and_colour_does_not(made):
    chance = 1 / CLASSES
    assert accuracy(power, made) > 8 * chance
    assert accuracy(colour, made) < 4 * chance


def test_one_family_alone(monkeypatch):
    """Dead leaves by their own name, each from its process and number; the full set is drawn as it is described."""
    made = textures.dataset(4, train=8, test=4, families=("dead leaves",))
    processes, images = jax.random.split(jax.random.key(0))
    want = textures.draw(0, processes, images, np.arange(8) % 4, np.arange(8))
    np.testing.assert_array_equal(made.train.images, want)
    assert made.name == "dead-leaves" and list(made.classes) == [f"dead leaves {i}" for i in range(4)]
    drawn = {}
    monkeypatch.setattr(
        textures, "dataset", lambda *sizes, families: drawn.update(sizes=sizes, families=families)
    )
    textures.only_dead_leaves()
    assert drawn == {"sizes": (1000, 40_000, 1000), "families": ("dead leaves",)}
