"""Wide-ResNets for differentially private training (paper, section 3 and appendix).

They differ from the usual ones of PyTorch and Flax: ReLU comes before the norm, convolutions are
weight-standardised, and no layer looks at more than one example.
"""

from collections.abc import Callable

import jax
from flax import nnx

from dpnb.gradients.views import add, fork
from dpnb.models.layers import Conv, Dtype, GroupNorm, mean_over_positions, relu
from dpnb.models.precision import dtype_of

STAGES = ((16, 1), (32, 2), (64, 2))  # channels, to be multiplied by `width`, and stride


def relu_then_norm(norm: Callable, x: jax.Array) -> jax.Array:
    """Applies ReLU, then the norm: the paper's order."""
    return norm(relu(x))


def norm_then_relu(norm: Callable, x: jax.Array) -> jax.Array:
    """Applies the norm, then ReLU: the classic order of pre-activation networks, for comparison."""
    return relu(norm(x))


class Block(nnx.Module):
    """A residual block: twice [ReLU -> norm -> 3x3 convolution], plus a skip path.

    The first block of every stage projects its skip path: ReLU -> norm -> 1x1 convolution.
    `act` is the order of ReLU and norm, see `relu_then_norm`.
    """

    def __init__(self, cin: int, cout: int, stride: int, first: bool, *, conv, norm, act=relu_then_norm):
        self.act = act
        self.norm1, self.conv1 = norm(cin), conv(cin, cout, 3, stride=stride)
        self.norm2, self.conv2 = norm(cout), conv(cout, cout, 3)
        self.skip_norm = norm(cin) if first else None
        self.skip_conv = conv(cin, cout, 1, stride=stride) if first else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, h, w, cin] to [batch, h', w', cout]."""
        x, skip = fork(x)
        if self.skip_conv is not None:
            skip = self.skip_conv(self.act(self.skip_norm, skip))
        y = self.conv1(self.act(self.norm1, x))
        return add(self.conv2(self.act(self.norm2, y)), skip)


class WideResNet(nnx.Module):
    """WRN-depth-width, with `depth = 6 n + 4` and n blocks in each of three stages.

    A 3x3 stem to 16 channels; stages of 16, 32, 64 times `width` channels at strides 1, 2, 2;
    the head ReLU -> norm -> mean over positions -> linear.  Source: the released code behind
    section 3 of the paper.  WRN-16-4 with 10 classes has 2,753,818 parameters.

    Args:
      depth: 10, 16, 22, 28, 34, 40, ...
      width: the widening factor.
      num_classes: size of the output.
      groups: groups of the group norm; channels must be a multiple of it.
      norm: builds the norm for a number of features (default: that group norm).
      standardised: weight standardisation of all convolutions.
      act: `relu_then_norm` (the paper's order) or `norm_then_relu`.
      dtype: of the computation (None: that of the inputs; "bfloat16" halves the memory).
        Parameters, norm statistics and weight standardisation stay float32.
      rngs: for the initial parameters.
    Raises:
      ValueError: `depth` is not 6 n + 4.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        *,
        groups: int = 16,
        norm: Callable[[int], nnx.Module] | None = None,
        standardised: bool = True,
        act: Callable = relu_then_norm,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, 28, 40 ...), got {depth}")

        def group_norm(features: int) -> nnx.Module:
            return GroupNorm(features, groups, epsilon=1e-5, dtype=dtype, rngs=rngs)

        def conv(cin: int, cout: int, size: int, stride: int = 1) -> Conv:
            return Conv(cin, cout, size, stride=stride, standardised=standardised, dtype=dtype, rngs=rngs)

        norm = norm or group_norm
        self.stem = conv(3, 16, 3)
        blocks, cin = [], 16
        for channels, stride in STAGES:
            for i in range((depth - 4) // 6):
                cout, first = channels * width, i == 0
                blocks.append(Block(cin, cout, stride if first else 1, first, conv=conv, norm=norm, act=act))
                cin = cout
        self.blocks = nnx.List(blocks)
        self.norm, self.act = norm(cin), act
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.linear = nnx.Linear(cin, num_classes, kernel_init=init, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to the classifier's inputs, [batch, 64 width]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return mean_over_positions(self.act(self.norm, x))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to logits float32 [batch, num_classes]."""
        return self.linear(self.features(images).astype(self.linear.kernel[...].dtype))


def build(experiment, num_classes: int, rngs: nnx.Rngs) -> WideResNet:
    """Builds the Wide-ResNet of an experiment, for `dpnb.models.registry`."""
    e = experiment
    return WideResNet(
        e.depth,
        e.width,
        num_classes,
        norm=None if e.norm == "group" else lambda features: nnx.identity,
        standardised=e.standardised,
        act=relu_then_norm if e.relu_first else norm_then_relu,
        dtype=dtype_of(e),
        rngs=rngs,
    )
