"""Fixed features in place of images, computed once, for networks that train only what comes after them.

They are scattering coefficients, or what the classifier of a public network reads. Large ones are kept in the
cache on disk, readable by their owner alone, as they are as private as the images.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from dpnb import cache
from dpnb.data import Dataset
from dpnb.data.augment import normalise
from dpnb.data.dataset import in_batches, padded_batches
from dpnb.experiments import Experiment
from dpnb.models import check_independent, registry, weights
from dpnb.models.pure import jitted
from dpnb.training.progress import interactive
from dpnb.training.settings import rounding

KEPT = 64 * 2**20  # bytes: features that take less are made in a minute or two and stay in memory
CODE = ("data", "models", "training/features.py")  # decides the numbers, together with `words` and the images


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
    guarantee for images. Scattering features of CIFAR-10 take 3.7 GB and some minutes on two cores. Features
    of `KEPT` bytes or more are kept on disk, and are then mapped into memory.

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
    return _extracted(data, _network(experiment), _like(experiment))


def prepare_test(experiment: Experiment, data: Dataset):
    """Returns what `prepare(experiment, data).test` holds, to the bit, without the features of training images.

    Raises:
      KeyError, ValueError, OSError: as `prepare`.
    """
    if not experiment.on_features or isinstance(data, FeatureDataset):
        return prepare(experiment, data).test
    if fixed := registry.fixed_features(experiment):
        return extract(fixed.make_transform(data.shape[0]), data.test)
    weights.provenance(experiment.pretrained, data)
    batch_size = registry.find_network(experiment.network).feature_batch
    return extract(_make_transform(data, _like(experiment)), data.test, batch_size)


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


def _like(experiment: Experiment) -> Experiment:
    """Keeps only the fields that affect the features, so that experiments share them."""
    own = {"network": experiment.network, "pretrained": experiment.pretrained}
    return Experiment("features", **(own | registry.feature_fields(experiment)))


def _make_transform(data: Dataset, experiment: Experiment) -> Callable:
    model = registry.make_network(experiment, len(data.classes), nnx.Rngs(0))
    check_independent(model, np.random.default_rng(0).normal(size=(3, *data.shape)))
    return jitted(
        model, lambda model, images: model.features(normalise(images, data.recipe)).astype("float32")
    )


@functools.lru_cache(maxsize=1)
def _extracted(data: Dataset, words: str, experiment: Experiment) -> FeatureDataset:
    batch_size = registry.find_network(experiment.network).feature_batch
    return _features(data, words, lambda: _make_transform(data, experiment), batch_size)


@functools.lru_cache(maxsize=1)
def _fixed(data: Dataset, module) -> FeatureDataset:
    return _features(data, module.WORDS, lambda: module.make_transform(data.shape[0]))


def _features(data: Dataset, words: str, make_transform: Callable, batch_size: int = 500) -> FeatureDataset:
    """Returns the features of both splits, from the cache or made here; the same bits either way."""
    key = _key(data, words, batch_size)
    found = cache.get("features", key)
    arrays = found.arrays if found else _made(data, words, make_transform(), batch_size, key)
    train, test = (FeatureSplit(arrays[f"{s}_features"], arrays[f"{s}_labels"]) for s in ("train", "test"))
    return FeatureDataset(data.name, train, test, data.classes, data.note, _identity(words, data), words)


def _key(data: Dataset, words: str, batch_size: int) -> dict[str, Any]:
    """All that decides the bits: network and weights (in `words`), images, program and machine."""
    return {
        "words": words,
        "images": data.fingerprint,
        "sizes": [len(data.train), len(data.test), *data.shape, batch_size],
        "recipe": repr(data.recipe),
        "code": cache.code(*CODE),
        "rounding": rounding(data),
    }


def _made(data: Dataset, words: str, transform, batch_size: int, key) -> dict[str, np.ndarray]:
    splits = {"train": data.train, "test": data.test}
    row = jax.eval_shape(transform, jax.ShapeDtypeStruct((batch_size, *data.shape), np.uint8)).shape[1:]
    shapes = {f"{s}_features": ((len(split), *row), np.dtype(np.float32)) for s, split in splits.items()}
    shapes |= {f"{s}_labels": ((len(split),), np.dtype(np.int32)) for s, split in splits.items()}
    size = sum(4 * int(np.prod(shape)) for shape, _ in shapes.values())
    what = f"features of {data.name}: {words}"
    small = cache.unused() if size < KEPT else contextlib.nullcontext()
    with small, cache.filling("features", key, what, shapes) as arrays:
        for name, split in splits.items():
            extract(transform, split, batch_size, (arrays[f"{name}_features"], arrays[f"{name}_labels"]))
    return arrays


def extract(transform, split, batch_size: int = 500, into: tuple[np.ndarray, np.ndarray] | None = None):
    """Applies `transform` (uint8 [batch, h, w, 3] -> float32 [batch, ...]) to every image, behind a bar.

    A photograph that cannot be read keeps the label -1, and will count as a zero gradient.

    Args:
      transform, batch_size: what is applied, to how many images at a time.
      split: images and labels.
      into: where to write, (features float32 [n, ...], labels int32 [n]); None for new arrays.
    Returns:
      A FeatureSplit of read-only views of these.
    """
    rows, found = into or (None, np.empty(len(split), np.int32))
    start = 0
    with _bar(len(split)) as step:
        for images, labels, real in padded_batches(split, batch_size):
            made = np.asarray(transform(images))[:real]
            if rows is None:
                rows = np.empty((len(split), *made.shape[1:]), np.float32)
            rows[start : start + real] = made
            found[start : start + real] = labels[:real]
            start += real
            step(real)
    views = rows.view(), found.view()
    for array in views:
        array.flags.writeable = False
    return FeatureSplit(*views)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int], Any]]:
    """Yields a function that counts images, on a bar if a person is watching."""
    if not interactive():
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="features", unit="image", dynamic_ncols=True) as bar:
        yield bar.update
