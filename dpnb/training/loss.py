"""The loss of one example's views."""

from collections.abc import Callable

import jax.numpy as jnp
import optax


def make_loss(apply) -> Callable:
    """Returns the softmax cross-entropy per view, with the fraction of views that are classified correctly.

    It is a function `(params, (views [K, ...], label [])) -> (nats float32 [K], fraction [])`.

    Args:
      apply: `(params, views float [K, ...]) -> logits [K, classes]`.
    """

    def loss(params, example):
        views, label = example  # [K, h, w, c], []
        logits = apply(params, views)
        labels = jnp.broadcast_to(label, logits.shape[:1])
        right = jnp.mean(logits.argmax(-1) == labels, dtype=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), right

    return loss
