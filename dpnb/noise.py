"""The Gaussian noise of one update, drawn once for the whole parameter tree."""

from typing import Any

import jax
import jax.numpy as jnp


def add_noise(total: Any, key: jax.Array, std: float) -> Any:
    """`total + Normal(0, std^2)`, independent in every coordinate of every leaf.

    Args:
      total: pytree of float32 arrays, the sum of clipped gradients of one logical batch.
      key: PRNG key, used for this update and nothing else. The noise depends on the key and
        the shapes only, so that every device of a mesh computes the same.
      std: noise_multiplier x sensitivity of the sum, in the units of `total`.
    Returns:
      pytree like `total`.
    Raises:
      ValueError: std is negative or not finite (an unclipped sum cannot be made private).
    """
    if not 0 <= std < float("inf"):
        raise ValueError(
            f"the noise needs a finite standard deviation, got {std}; a sum that is not clipped "
            "has no finite sensitivity: set clip_norm, or noise_multiplier = 0"
        )
    if std == 0:
        return total
    leaves, tree = jax.tree.flatten(total)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + std * jax.random.normal(k, x.shape, jnp.float32) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)
