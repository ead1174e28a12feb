"""Learns the filters and the whitening of `dpnb.models.patches` from public images, without their labels.

Patches of equal contrast are whitened and clustered by spherical k-means (Coates & Ng 2012), whose centres are the
filters. Then the covariance of their answers, on other public images, gives the principal components that are kept.
"""

import numpy as np
from flax import nnx

from dpnb.data import Dataset
from dpnb.models import patches
from dpnb.models.patches import SCALES, SIZE, PatchLinear
from dpnb.models.pure import jitted
from dpnb.models.weights.catalogue import packed
from dpnb.models.weights.conversion import Arrays

PATCHES = 200_000  # from which the filters of a scale are learnt
ROUNDS = 12  # of k-means
IMAGES = 20_000  # at most, from which the filters are learnt, and as many for the covariance
PATCH_FLOOR = 0.1  # added to the variances of patches, which are near 1, before they are whitened
FLOOR = (
    0.3  # of the mean variance, added to those of the answers: rare directions stay smaller than common ones
)
BATCH = 10  # images at once: what is computed stays in the cache


def learnt(data: Dataset, saw: str | None = None) -> bytes:
    """Returns what `learn` finds as a safetensors file in float16, which says what was seen.

    Args:
      saw: that in words; by default the name and the fingerprint of the data.
    """
    return packed(learn(data), saw or f"{data.name} (fingerprint {data.fingerprint})", data.name)


def learn(data: Dataset, width: float = 1.0, seed: int = 0) -> Arrays:
    """Returns parameters of a `PatchLinear`, but for its last layer, learnt from a public data set.

    Args:
      data: its training images, in an order drawn from the seed, are read; no label is.
      width: a multiple of `patches.FILTERS` and `patches.FEATURES`.
      seed: of the choice of images and patches, and of the first centres.
    Returns:
      {"banks/0/kernel": float32 array, ...}.
    Raises:
      ValueError: fewer images than twice the features, so that their covariance means nothing.
    """
    filters, features = int(patches.FILTERS * width), int(patches.FEATURES * width)
    if len(data.train) < 2 * features:
        raise ValueError(
            f"a covariance of {features} features needs twice as many images, got {len(data.train)}"
        )
    random = np.random.default_rng(seed)
    chosen = data.train.images[np.sort(random.permutation(len(data.train))[: 2 * IMAGES])]
    random.shuffle(chosen)
    half = len(chosen) // 2
    model = PatchLinear(1, filters, features, rngs=nnx.Rngs(0))
    for bank, by in zip(model.banks, SCALES, strict=True):
        kernel, bias = learn_filters(chosen[:half], filters, by, random)
        bank.kernel[...], bank.bias[...] = kernel, bias
    mean, whitening = whiten(_answers(model, chosen[half:]), features)
    learnt = {"mean": mean, "whitening": whitening}
    for i, bank in enumerate(model.banks):
        learnt |= {
            f"banks/{i}/kernel": np.asarray(bank.kernel[...]),
            f"banks/{i}/bias": np.asarray(bank.bias[...]),
        }
    return learnt


def learn_filters(images: np.ndarray, filters: int, by: int, random: np.random.Generator):
    """Returns (kernel float32 [6, 6, 3, filters], bias float32 [filters]) for images shrunk `by` a factor.

    Args:
      images: uint8 [n, h, w, 3].
    """
    found = _patches(images, by, random)
    mirrored = found.reshape(-1, SIZE, SIZE, 3)[:, :, ::-1].reshape(found.shape)
    both = np.concatenate([found, mirrored])  # so that the twin of a filter is as white as the filter
    mean, values, vectors = both.mean(0), *np.linalg.eigh(np.cov(both.T))
    white = (vectors / np.sqrt(values + PATCH_FLOOR)) @ vectors.T
    points = (found - mean) @ white
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-6)
    kernel = white @ k_means(points.astype(np.float32), filters, random).T
    bias = -mean @ kernel
    kernel -= kernel.mean(0)  # patches have mean zero, so the answers stay
    return kernel.reshape(SIZE, SIZE, 3, filters).astype(np.float32), bias.astype(np.float32)


def k_means(points: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Returns directions float32 [clusters, d] by spherical k-means; a point and its negative are the same.

    Args:
      points: float32 [n, d], of length 1.
    """
    centres = random.normal(size=(clusters, points.shape[1])).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for _ in range(ROUNDS):
        likeness = points @ centres.T
        nearest = np.abs(likeness).argmax(1)
        share = np.zeros_like(likeness)
        rows = np.arange(len(points))
        share[rows, nearest] = likeness[rows, nearest]
        centres = share.T @ points + 1e-3 * centres  # an empty cluster stays where it is
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return centres


def whiten(answers: np.ndarray, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean float32 [d] and whitening float32 [d, features] on the first principal components.

    Args:
      answers: float32 [n, d].
    """
    mean = answers.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.cov((answers - mean).T))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    floor = FLOOR * values.mean()
    whitening = vectors[:, :features] / np.sqrt(values[:features] + floor)
    return mean.astype(np.float32), whitening.astype(np.float32)


def _patches(images: np.ndarray, by: int, random: np.random.Generator) -> np.ndarray:
    """Draws `PATCHES` patches of equal contrast, float64 [PATCHES, 108], mean 0."""
    small = np.concatenate([patches.shrink(np.float32(part), by) for part in _batches(images)])
    _, h, w, _ = small.shape
    n, top, left = (random.integers(high, size=PATCHES) for high in (len(small), h - SIZE + 1, w - SIZE + 1))
    windows = np.lib.stride_tricks.sliding_window_view(small, (SIZE, SIZE), (1, 2))
    drawn = np.moveaxis(windows[n, top, left], 1, -1).reshape(PATCHES, -1).astype(np.float64)
    drawn -= drawn.mean(1, keepdims=True)
    return drawn / np.sqrt(drawn.var(1, keepdims=True) + patches.CONTRAST)


def _answers(model: PatchLinear, images: np.ndarray) -> np.ndarray:
    apply = jitted(model, lambda model, pixels: model.answers(pixels))
    whole = len(images) // BATCH * BATCH
    return np.concatenate([np.asarray(apply(np.float32(part))) for part in _batches(images[:whole])])


def _batches(images: np.ndarray):
    return (images[i : i + BATCH] for i in range(0, len(images), BATCH))
