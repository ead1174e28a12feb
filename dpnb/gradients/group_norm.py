"""Group norm by sums per channel, whose gradient needs two reductions and one pass.

The statistics of a group are folded from sums over positions, [views, channels]. No array of the size of an image is
reshaped to groups, which would cost accelerators a copy.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpnb.gradients.views import merged, wide


class _Kept(NamedTuple):
    """What the gradient needs: the inputs, and mean and 1 / standard deviation of each channel's group."""

    x: jax.Array
    scale: jax.Array
    mean: jax.Array
    inverse: jax.Array


def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float = 1e-5, dtype: Any = None
) -> jax.Array:
    """Normalises each group of channels of each view to mean 0 and variance 1, then scales and shifts.

    The variance is the mean of squares less the square of the mean, at least 0, as in Flax. Statistics are float32
    (float64 if x is). Reverse-over-reverse differentiation is not supported.

    Args:
      x: floats [views, *spatial, channels].
      scale, bias: floats [channels].
      groups: divides the number of channels.
      epsilon: added to the variance.
      dtype: of the result (default: the promoted one of x, scale and bias).
    Returns:
      [views, *spatial, channels].
    Raises:
      ValueError: `groups` does not divide the number of channels.

    >>> x = jnp.array([[[1.0, 2.0, 3.0, 5.0]]])
    >>> print(group_norm(x, jnp.ones(4), jnp.zeros(4), groups=2, epsilon=0.0))
    [[[-1.  1. -1.  1.]]]
    """
    if x.shape[-1] % groups:
        raise ValueError(
            f"the number of channels must be a multiple of groups, got {x.shape[-1]} and {groups}"
        )
    dtype = jnp.dtype(dtype or jnp.result_type(x, scale, bias))
    return _group_norm(groups, epsilon, dtype)(x, scale, bias)


@functools.cache
def _group_norm(groups: int, epsilon: float, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    def fold(sums: jax.Array, size: int) -> jax.Array:
        """Means over groups of `size` numbers a channel, at every channel: [views, channels] -> the same."""
        views, channels = sums.shape
        means = sums.reshape(views, groups, channels // groups).sum(-1) / (size * channels // groups)
        return jnp.repeat(means, channels // groups, axis=-1)

    def forward(shared: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
        scale, bias = shared
        positions = tuple(range(1, x.ndim - 1))
        size = x[0, ..., 0].size
        x = wide(x)
        mean = fold(x.sum(positions), size)
        variance = jnp.maximum(fold(jnp.square(x).sum(positions), size) - jnp.square(mean), 0)
        inverse = jax.lax.rsqrt(variance + epsilon)
        slope = inverse * jnp.expand_dims(scale, 0)
        shift = jnp.expand_dims(bias, 0) - mean * slope
        y = x * jnp.expand_dims(slope, positions) + jnp.expand_dims(shift, positions)
        return y.astype(dtype), mean, inverse

    def backward(
        scale: jax.Array, g: jax.Array, x: jax.Array, mean: jax.Array, inverse: jax.Array
    ) -> tuple[jax.Array, ...]:
        """(gradient of x; of bias and scale, view by view)."""
        positions = tuple(range(1, x.ndim - 1))
        size = x[0, ..., 0].size
        x, g, narrow = wide(x), wide(g), x.dtype
        of_bias = g.sum(positions)
        of_scale = ((g * x).sum(positions) - mean * of_bias) * inverse
        slope = inverse * jnp.expand_dims(scale, 0)
        tilt = -jnp.square(inverse) * fold(jnp.expand_dims(scale, 0) * of_scale, size)
        shift = -inverse * fold(jnp.expand_dims(scale, 0) * of_bias, size) - tilt * mean
        slope, tilt, shift = (jnp.expand_dims(t, positions) for t in (slope, tilt, shift))
        return (g * slope + x * tilt + shift).astype(narrow), of_bias, of_scale

    merged_forward, merged_backward = merged(forward), merged(backward)

    @jax.custom_vjp
    def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return merged_forward((scale, bias), x)[0]

    def keep(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[_Kept, jax.Array]]:
        y, mean, inverse = merged_forward((scale, bias), x)
        return y, (_Kept(x, scale, mean, inverse), bias)

    def pull_back(kept: tuple[_Kept, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (x, scale, mean, inverse), bias = kept
        of_x, of_bias, of_scale = merged_backward(scale, g, x, mean, inverse)
        return of_x, of_scale.sum(0).astype(scale.dtype), of_bias.sum(0).astype(bias.dtype)

    norm.defvjp(keep, pull_back)
    return norm
