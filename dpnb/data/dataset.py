"""Images and labels in memory: splits, data sets, and an error whose message says what to run."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from dpnb.data.recipe import SMALL_IMAGES, Recipe

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "textures": 192, "dead-leaves": 1000}
INSTALL = "pip install tensorflow-datasets array-record pillow"
# Where accuracy is reported, by preference. Small images (CIFAR) have a labelled test split, as in the paper.
# The test images of ImageNet and Places365 have no labels, so their validation split is reported, as in the
# paper; in folders of photographs it is usually called "val".
SMALL_IMAGE_SPLITS = ("test", "validation", "val")
PHOTOGRAPH_SPLITS = ("validation", "val", "test")
FOLDER_SPLITS = ("val", "validation", "test")


class DataError(ValueError):
    """The data are missing, unreadable or malformed; the message says what to run."""


class NotPrepared(DataError):
    """TFDS has no such data set on this machine."""


class Unreachable(DataError):
    """The data set cannot be downloaded: there is no network, or it broke."""


def reported_split(available: Sequence[str], preference: tuple[str, ...]) -> str | None:
    """Returns the first split of `preference` that is available, None if there is none.

    >>> reported_split(("train", "test", "validation"), PHOTOGRAPH_SPLITS)
    'validation'
    """
    return next((split for split in preference if split in available), None)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images uint8 [n, h, w, 3] and their labels int32 [n], both read-only, n >= 1.

    Raises:
      DataError: another shape or dtype, no image, or labels beyond int32.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        images, labels = np.asarray(self.images), np.asarray(self.labels)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images must be uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}; "
                "channels come last, values are 0 to 255, not yet normalised"
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels must be integers [{len(images)}], one for each image, got "
                f"{labels.dtype} {list(labels.shape)}; one-hot labels need an argmax"
            )
        if not len(images):
            raise DataError("a split needs at least one image, got none; prepare or export the data again")
        small = np.iinfo(np.int32)
        if labels.min() < small.min or labels.max() > small.max:
            raise DataError(f"labels must fit int32, got {labels.min()} to {labels.max()}")
        for name, array in (("images", images), ("labels", labels.astype(np.int32))):
            array = array.view()
            array.flags.writeable = False  # the fingerprint stays true
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.images)

    def head(self, n: int) -> "Split":
        """Returns the first n images (all, if there are fewer)."""
        return Split(self.images[:n], self.labels[:n])

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all images in order: (images [size or fewer, h, w, 3], labels)."""
        return in_batches(self, size)

    def __repr__(self) -> str:
        return f"Split(uint8 {list(self.images.shape)})"


def in_batches(split, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `split.images` and `split.labels`, `size` rows at a time (fewer at the end)."""
    for start in range(0, len(split), size):
        yield split.images[start : start + size], split.labels[start : start + size]


def padded_batches(split, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields all images of a split in batches of one static size, so that what reads them compiles once.

    Yields:
      (images [size, ...], labels int32 [size], how many of them are real); the rest is zeros.
    """
    for images, labels in split.batches(size):
        real = len(labels)
        images = np.pad(images, [(0, size - real)] + [(0, 0)] * (images.ndim - 1))
        yield images, np.pad(labels, (0, size - real)).astype(np.int32), real


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training images and the split to report on (test, or held-out validation).

    name: of the data set, as records and `load` know it.
    classes: their names, in the order of the labels.
    note: a caveat about the data to repeat beside every accuracy; "" if there is none.

    Raises:
      DataError: train and test images differ in shape, or a label has no class.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    note: str = ""
    lowest_label: ClassVar[int] = 0

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(
                "train and test images must have one shape, got "
                f"{list(self.train.images.shape[1:])} and {list(self.test.images.shape[1:])}"
            )
        for which, split in (("train", self.train), ("test", self.test)):
            low, high = split.labels.min(), split.labels.max()
            if low < self.lowest_label or high >= len(self.classes):
                raise DataError(
                    f"labels must be 0 to {len(self.classes) - 1} (one name in `classes` each), "
                    f"got {low} to {high} in the {which} split of {self.name}; do labels start at 1?"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one network input: (h, w, 3)."""
        return self.train.images.shape[1:]

    @property
    def recipe(self) -> Recipe:
        """How stored images become network inputs."""
        return SMALL_IMAGES

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shapes, images and labels of both splits, order included."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for array, dtype in ((split.images, "u1"), (split.labels, "<i4")):
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array, dtype))
        return digest.hexdigest()
