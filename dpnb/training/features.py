"""Fixed features in place of images, computed once, for networks that train only what comes after them.

They are scattering coefficients, or what the classifier of a public network reads.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from dpnb.data import Dataset
from dpnb.data.augment import normalise
from dpnb.data.dataset import in_batches, padded_batches
from dpnb.experiments import Experiment
from dpnb.models import check_independent, registry, weights


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureSplit:
    """Features `images` float32 [n, ...], one row per image, and labels int32 [n], both read-only."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def head(self, n: int) -> "FeatureSplit":
        """Returns the first n rows (all, if there are fewer)."""
        return FeatureSplit(self.images[:n], self.labels[:n])

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all rows in order: (features [size or fewer, ...], labels)."""
        return in_batches(self, size)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureDataset(Dataset):
    """A data set of features, identified by the images and by how the features were computed from them.

    transform: how they were computed, in words that tell every transform from every other.
    identity: SHA-256 (hex) of these words and the images' fingerprint.
    """

    identity: str = ""
    transform: str = ""

    lowest_label: ClassVar[int] = -1  # of an image that could not be read

    def __post_init__(self):
        super().__post_init__()
        if not (self.identity and self.transform):
            raise ValueError("features must say what they are made of (identity, transform); use `prepare`")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images' fingerprint and the words of the transform."""
        return self.identity


def prepare(experiment: Experiment, data: Dataset) -> Dataset:
    """Returns what the experiment's network reads: the images, or features that are computed here, once.

    Row i depends on image i alone and on nothing learnt from the data, so training on features keeps the
    guarantee for images. Scattering features of CIFAR-10 take 3.7 GB and some minutes on two cores.

    Raises:
      KeyError, ValueError, OSError: the public weights are not available, are another network's, or saw
        these very images; or `data` are features of another kind.
    """
    if not experiment.on_features:
        return data
    if isinstance(data, FeatureDataset):
        check(experiment, data)
        return data
    if fixed := registry.fixed_features(experiment):
        return _fixed(data, fixed)
    weights.provenance(experiment.pretrained, data)
    # Pass on only the fields that affect the features, so that experiments share them.
    like = Experiment("features", network=experiment.network, pretrained=experiment.pretrained)
    like = like.replace(**registry.feature_fields(experiment))
    return _extracted(data, _network(experiment), like)


def check(experiment: Experiment, data: Dataset) -> None:
    """Refuses what the experiment's network does not read.

    Raises:
      ValueError: `data` are images and the network reads features, or the reverse, or other features.
    """
    is_features = isinstance(data, FeatureDataset)
    if experiment.on_features and not is_features:
        raise ValueError(f"{experiment.name} trains on features, got images; call `features.prepare` first")
    if is_features and not (experiment.on_features and data.transform == transform(experiment)):
        raise ValueError(f"{experiment.name} reads other features than these, which are {data.transform}")


def transform(experiment: Experiment) -> str:
    """Says in words, which are hashed into fingerprints, how the features of an experiment are computed."""
    fixed = registry.fixed_features(experiment)
    return fixed.WORDS if fixed else _network(experiment)


def fingerprint(experiment: Experiment, data: Dataset) -> str:
    """Returns the fingerprint of `prepare(experiment, data)` without computing a feature."""
    if not experiment.on_features or isinstance(data, FeatureDataset):
        return data.fingerprint
    return _identity(transform(experiment), data)


def _identity(words: str, data: Dataset) -> str:
    return hashlib.sha256(f"{words}, of {data.fingerprint}".encode()).hexdigest()


def _network(e: Experiment) -> str:
    content = weights.identity(weights.load(e.pretrained))
    kind, fields = registry.find_network(e.network).kind, registry.feature_fields(e)
    return f"what the classifier reads in a {kind} of {fields} with the weights {content}"


@functools.lru_cache(maxsize=1)
def _extracted(data: Dataset, words: str, experiment: Experiment) -> FeatureDataset:
    model = registry.make_network(experiment, len(data.classes), nnx.Rngs(0))
    check_independent(model, np.random.default_rng(0).normal(size=(3, *data.shape)))
    transform = jax.jit(lambda images: model.features(normalise(images, data.recipe)).astype("float32"))
    return _features(data, words, transform, registry.find_network(experiment.network).feature_batch)


@functools.lru_cache(maxsize=1)
def _fixed(data: Dataset, module) -> FeatureDataset:
    return _features(data, module.WORDS, module.make_transform(data.shape[0]))


def _features(data: Dataset, words: str, transform, batch_size: int = 500) -> FeatureDataset:
    train, test = (extract(transform, split, batch_size) for split in (data.train, data.test))
    return FeatureDataset(data.name, train, test, data.classes, data.note, _identity(words, data), words)


def extract(transform, split, batch_size: int = 500) -> FeatureSplit:
    """Applies `transform` (uint8 [batch, h, w, 3] -> float32 [batch, ...]) to every image.

    A photograph that cannot be read keeps the label -1, and will count as a zero gradient.
    """
    rows, found, start = None, np.empty(len(split), np.int32), 0
    for images, labels, real in padded_batches(split, batch_size):
        made = np.asarray(transform(images))[:real]
        if rows is None:
            rows = np.empty((len(split), *made.shape[1:]), np.float32)
        rows[start : start + real] = made
        found[start : start + real] = labels[:real]
        start += real
    for array in (rows, found):
        array.flags.writeable = False
    return FeatureSplit(rows, found)
