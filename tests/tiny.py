"""Models, data and experiments so small that a test of the training loop takes seconds."""

import numpy as np
from flax import nnx

from dpnb.data import Dataset, Split
from dpnb.experiments import Experiment

CLASSES = 4


class Linear(nnx.Module):
    """192 pixels -> 4 logits; two leaves, kernel [192, 4] and bias [4]."""

    def __init__(self, seed: int = 0, classes: int = CLASSES):
        self.layer = nnx.Linear(192, classes, rngs=nnx.Rngs(seed))

    def __call__(self, images):
        return self.layer(images.reshape(len(images), -1))


def data(n: int = 64, seed: int = 0) -> Dataset:
    """n random training images uint8 [n, 8, 8, 3], 16 test images, four classes."""
    rng = np.random.default_rng(seed)

    def split(m):
        return Split(rng.integers(0, 256, (m, 8, 8, 3), np.uint8), rng.integers(0, CLASSES, m, np.int32))

    return Dataset("random", split(n), split(16), tuple("abcd"))


def experiment(**changes) -> Experiment:
    """sigma = 2, six steps, q = 16 / 64, epsilon calibrated."""
    fields = dict(
        name="tiny", dataset="random", epsilon=None, delta=1e-3, noise_multiplier=2.0, steps=6,
        expected_batch_size=16, augmult=2, learning_rate=0.5, physical_batch_size=4, eval_every=2, accountant="rdp",
    )  # fmt: skip
    return Experiment(**{**fields, **changes})
