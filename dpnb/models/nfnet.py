"""NFNets (Brock et al. 2021b): normaliser-free networks with grouped convolutions and squeeze-and-excite.

The later version of the paper fine-tunes them on ImageNet.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dpnb.gradients.views import add, fork, per_view
from dpnb.models.layers import Conv, Dtype, mean_over_positions
from dpnb.models.nf_resnet import StochasticDepth, branch, layout, through, two_paths
from dpnb.models.precision import dtype_of

DEPTHS = {"F0": (1, 2, 6, 3), "F1": (2, 4, 12, 6), "F3": (4, 8, 24, 12)}
SIZES = {"F0": (192, 256), "F1": (224, 320), "F3": (320, 416)}  # image side in training, in evaluation
WIDTHS = (256, 512, 1536, 1536)
GROUP = 128  # channels in a group of the 3x3 convolutions
GELU_GAIN = 1.7015043497085571


@per_view
def scaled_gelu(x: jax.Array) -> jax.Array:
    """Applies a GELU scaled such that a unit Gaussian keeps variance one."""
    return nnx.gelu(x) * GELU_GAIN


@per_view
def gate(x: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies x [batch, height, width, channels] by factors [batch, 1, 1, channels], in the dtype of x."""
    return x * factors.astype(x.dtype)


class SqueezeExcite(nnx.Module):
    """Computes a gate 2 * sigmoid(...) in [0, 2] for each channel from the mean over positions."""

    def __init__(self, channels: int, ratio: float, *, rngs: nnx.Rngs):
        self.squeeze = nnx.Linear(channels, max(1, int(channels * ratio)), rngs=rngs)
        self.excite = nnx.Linear(max(1, int(channels * ratio)), channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to gates float32 [batch, 1, 1, channels]."""
        mean = mean_over_positions(x, jnp.float32)
        factors = 2 * nnx.sigmoid(self.excite(nnx.relu(self.squeeze(mean))))
        return jnp.expand_dims(factors, (1, 2))


class NFBlock(nnx.Module):
    """A residual block: x -> shortcut + alpha * skip_gain * SE(1x1 -> two grouped 3x3 -> 1x1)(beta * act(x)).

    The shortcut is x, or a 1x1 convolution of beta * act(x), averaged over 2x2 positions at stride 2.
    """

    def __init__(self, cin: int, cout: int, stride: int, beta: float, alpha: float, skip_gain: float, group: int,
                 *, conv, rngs):  # fmt: skip
        groups = max(1, cout // 2 // group)
        middle = groups * min(group, cout // 2)
        self.conv0 = conv(cin, middle, 1)
        self.conv1 = conv(middle, middle, 3, stride=stride, groups=groups)
        self.conv1b = conv(middle, middle, 3, groups=groups)
        self.conv2 = conv(middle, cout, 1)
        self.shortcut = conv(cin, cout, 1) if stride > 1 or cin != cout else None
        self.excite = SqueezeExcite(cout, 0.5, rngs=rngs)
        self.skip_gain = nnx.Param(jnp.asarray(skip_gain, jnp.float32))
        self.stride, self.beta, self.alpha = stride, beta, alpha

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Maps [batch, h, w, cin] to [batch, h', w', cout].

        `keep` [batch] is 0 for examples whose residual branch is dropped (stochastic depth), else 1.
        """
        y, skip = two_paths(x, scaled_gelu, self.beta, self.shortcut, self.stride)
        y = self.conv1(scaled_gelu(self.conv0(y)))
        y = self.conv2(scaled_gelu(self.conv1b(scaled_gelu(y))))
        y, gated = fork(y)
        y = gate(y, self.excite(gated))
        return add(skip, branch(y, self.skip_gain[...] * self.alpha, keep))


class NFNet(nnx.Module):
    """NFNet-F0, -F1 or -F3 (Brock et al. 2021b; the paper's later ImageNet numbers are F3's).

    The stem is four 3x3 convolutions (16, 32, 64, 128 channels, strides 2, 1, 1, 2). Stages of 256, 512,
    1,536 and 1,536 channels at strides 1, 2, 2, 2 follow, then a 1x1 convolution to 3,072 channels, scaled
    GELU -> mean -> linear. F0 with 1,000 classes has 71,489,284 parameters, F3 254,924,200: one gradient of
    F3 takes 1 GB.

    Args:
      variant: "F0", "F1" or "F3", or the number of blocks in each stage.
      num_classes: size of the output.
      width: multiplies all channels, and the size of a group.
      alpha, skip_gain, stochastic_depth, remat, dtype, rngs: as in `NFResNet`; branches begin with gain 0.
    Raises:
      ValueError: there is no such variant.
    """

    def __init__(
        self,
        variant="F0",
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        alpha: float = 0.2,
        skip_gain: float = 0.0,
        stochastic_depth: float = 0.0,
        remat: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if isinstance(variant, str) and variant not in DEPTHS:
            raise ValueError(f"variant must be one of {', '.join(DEPTHS)}, or blocks a stage, got {variant}")
        depths = DEPTHS[variant] if isinstance(variant, str) else tuple(variant)
        conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
        stem = [int(c * width) for c in (16, 32, 64, 128)]
        sizes = zip([3, *stem[:-1]], stem, (2, 1, 1, 2), strict=True)
        self.stem = nnx.List([conv(cin, cout, 3, stride=stride) for cin, cout, stride in sizes])
        self.blocks = nnx.List(
            [
                NFBlock(*shape, alpha, skip_gain, int(GROUP * width), conv=conv, rngs=rngs)
                for shape in layout(stem[-1], WIDTHS, depths, width, alpha)
            ]
        )
        cin = int(WIDTHS[-1] * width)
        self.final = conv(cin, 2 * cin, 1)
        self.drop = StochasticDepth(stochastic_depth, len(self.blocks), rngs)
        self.linear = nnx.Linear(2 * cin, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        self.remat = remat

    def features(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to the classifier's inputs, [batch, 3072 width]."""
        x = self.stem[0](images)
        for conv in self.stem[1:]:
            x = conv(scaled_gelu(x))
        x = through(self.blocks, x, self.drop, self.remat)
        return mean_over_positions(scaled_gelu(self.final(x)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to logits float32 [batch, num_classes]."""
        return self.linear(self.features(images).astype(self.linear.kernel[...].dtype))


def build(experiment, num_classes: int, rngs: nnx.Rngs) -> NFNet:
    """Builds the NFNet of an experiment, whose `network` ends in its size ("nfnet-f0").

    It has no stochastic depth, like the NF-ResNets.
    """
    e = experiment
    size = e.network.rpartition("-")[2].upper()
    return NFNet(size, num_classes, width=e.width, remat=e.remat, dtype=dtype_of(e), rngs=rngs)
