"""Layers that are not as Flax has them: a convolution with weight standardisation, and group norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from dpnb.gradients import conv_general_dilated, group_norm, per_example
from dpnb.gradients.views import add_bias, per_view

Dtype = jax.typing.DTypeLike


def standardise(kernel: jax.Array, gain: jax.Array, epsilon: float = 1e-4) -> jax.Array:
    """Standardises the weights of a convolution, with a gain (paper, section 3; Brock et al. 2021).

    Each output channel gets mean 0 and variance `gain^2 / fan_in`:
    `(w - mean) * gain / sqrt(max(var * fan_in, epsilon))`; epsilon is a floor and is not added.

    Args:
      kernel: float32 [*spatial, features_in / groups, features_out].
      gain: float32 [features_out].
    Returns:
      float32, the shape of `kernel`.
    """
    return _standardise(epsilon, kernel, gain)


def _formula(epsilon, kernel, gain):
    centred, _, inverse = _statistics(epsilon, kernel)
    return centred * _over_channels(gain * inverse, kernel)


def _statistics(epsilon, kernel):
    """(kernel less its means; of each channel, whether it is above the floor, and 1 / sqrt(variance * fan_in))."""
    axes = tuple(range(kernel.ndim - 1))
    centred = kernel - kernel.mean(axes, keepdims=True)
    square = jnp.square(centred).sum(axes)
    return centred, square > epsilon, jax.lax.rsqrt(jnp.maximum(square, epsilon))


def _over_channels(x, kernel):
    """Returns [features_out] in as many dimensions as the kernel has."""
    return jnp.expand_dims(x, tuple(range(kernel.ndim - 1)))


_standardise = jax.custom_vjp(_formula, nondiff_argnums=(0,))


def _backward(epsilon, residuals, cotangent):
    """Two sums per channel of the cotangent, then one pass; compilers repeat that rather than store its result."""

    def vjp(kernel, gain, cotangent):
        centred, above, inverse = _statistics(epsilon, kernel)
        axes = tuple(range(kernel.ndim - 1))
        mean, product = cotangent.mean(axes), (cotangent * centred).sum(axes)
        slope = gain * inverse
        tilt = jnp.where(above, slope * jnp.square(inverse) * product, 0)
        slope, tilt, shift = (_over_channels(x, kernel) for x in (slope, tilt, slope * mean))
        return cotangent * slope - centred * tilt - shift, product * inverse

    return per_example(vjp)(*residuals, cotangent)


_standardise.defvjp(lambda epsilon, *args: (_formula(epsilon, *args), args), _backward)


class Conv(nnx.Module):
    """A 2-d convolution with bias and (by default) weight standardisation.

    `padding` is "SAME" as in JAX and TensorFlow, where an even image at stride 2 gets one more row
    below than above, or "symmetric" as in PyTorch: (kernel_size - 1) / 2 on every side. With `groups`,
    channels are convolved group by group; both numbers of features must be multiples of `groups`.

    The kernel starts as Normal(0, 1 / fan_in), untruncated, the gain as 1 and the bias as 0 (the authors'
    released code). Per-example weight gradients are fast, see `dpnb.gradients.convolution`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: str = "SAME",
        standardised: bool = True,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features // groups, out_features)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.gain = nnx.Param(jnp.ones(out_features)) if standardised else None
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.stride, self.groups, self.dtype = stride, groups, dtype
        side = (kernel_size - 1) // 2
        self.padding = "SAME" if padding == "SAME" else ((side, side), (side, side))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves [batch, height, width, in_features] to [batch, height', width', out_features]."""
        kernel = self.kernel[...]
        if self.gain is not None:
            kernel = standardise(kernel, self.gain[...])
        dtype = self.dtype or jnp.result_type(x, kernel)
        y = conv_general_dilated(
            x.astype(dtype), kernel.astype(dtype), (self.stride, self.stride), self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups,
        )  # fmt: skip
        return add_bias(y, self.bias[...])


class GroupNorm(nnx.GroupNorm):
    """Flax's group norm, computed by `dpnb.gradients.group_norm`; `mask` is not supported."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [batch, *spatial, features], each example on its own."""
        return group_norm(x, self.scale[...], self.bias[...], self.num_groups, self.epsilon, self.dtype)


relu = per_view(nnx.relu)


def mean_over_positions(x: jax.Array, dtype: Dtype | None = None) -> jax.Array:
    """Maps [batch, height, width, features] to [batch, features], in the dtype of x or the one given."""
    return per_view(lambda x: x.mean((1, 2), dtype=dtype))(x)
