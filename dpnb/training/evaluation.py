"""Evaluates raw and averaged parameters, without augmentation (paper, section 3)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpnb.data import Recipe, Split
from dpnb.data.augment import plain
from dpnb.data.dataset import padded_batches
from dpnb.data.recipe import SMALL_IMAGES
from dpnb.training.sharding import fetch_replicated


class Evaluation(NamedTuple):
    """Accuracy in percent, mean cross-entropy in nats, and predictions int32 [n]."""

    accuracy: float
    loss: float
    predictions: np.ndarray


def even_batch_size(n: int, most: int = 250) -> int:
    """Returns the size of batches that pads n images least, in as few calls as batches of `most` need.

    >>> even_batch_size(297), even_batch_size(10_000)
    (149, 250)
    """
    calls = -(-n // most)
    return -(-n // calls)


def make_evaluate(
    apply: Callable[[Any, jax.Array], jax.Array], batch_size: int = 250, recipe: Recipe = SMALL_IMAGES
) -> Callable:
    """Returns a function `(params, split) -> Evaluation`, compiled once for one batch size.

    A photograph that cannot be read (label -1) counts as misclassified, and is left out of the loss.

    Args:
      apply: `(params, inputs float [batch, ...]) -> logits [batch, classes]`.
      batch_size: images per call.
      recipe: how the images of the split become inputs, `Dataset.recipe`.
    """

    @jax.jit
    def forward(params, images, labels):
        logits = apply(params, plain(images, recipe)).astype(jnp.float32)
        labels = jnp.maximum(labels, 0)
        return logits.argmax(-1), optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def evaluate(params, split: Split) -> Evaluation:
        params = jax.tree.map(fetch_replicated, params)
        predictions, losses, right = [], [], []
        for images, labels, real in padded_batches(split, batch_size):
            guess, loss = forward(params, images, labels)
            labels = labels[:real]
            predictions.append(np.asarray(guess[:real], np.int32))
            losses.append(np.asarray(loss[:real])[labels >= 0])
            right.append(predictions[-1] == labels)
        accuracy = 100 * float(np.mean(np.concatenate(right)))
        return Evaluation(accuracy, float(np.mean(np.concatenate(losses))), np.concatenate(predictions))

    return evaluate
