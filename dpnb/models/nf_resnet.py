"""Normaliser-free ResNets (Brock et al. 2021), as in the paper's ImageNet experiments.

They have no normalisation of activations, so nothing mixes examples or views; scaled activations and
standardised weights control the variance instead.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dpnb.gradients.views import add, fork, multiply, per_view
from dpnb.models.layers import Conv, Dtype, mean_over_positions
from dpnb.models.precision import dtype_of

DEPTHS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
WIDTHS = (256, 512, 1024, 2048)
RELU_GAIN = 1.7139588594436646  # sqrt(2 / (1 - 1 / pi)): unit variance after ReLU of a unit Gaussian


@per_view
def scaled_relu(x: jax.Array) -> jax.Array:
    """Applies a ReLU scaled such that a unit Gaussian keeps variance one."""
    return nnx.relu(x) * RELU_GAIN


def times(x: jax.Array, number: float) -> jax.Array:
    """Returns x [batch, ...] times a number, in the dtype of x."""
    return per_view(lambda x: x * number)(x)


def expected_stds(depths: Sequence[int], alpha: float = 0.2) -> list[float]:
    """Returns the theoretical standard deviation of each block's input, all blocks in a row.

    A residual branch adds variance alpha^2. The first block of a stage divides its input by the standard
    deviation on the skip path too, so the variance after it is 1 + alpha^2.
    """
    made, std = [], 1.0
    for depth in depths:
        for block in range(depth):
            made.append(std)
            std = ((1.0 if block == 0 else std) ** 2 + alpha**2) ** 0.5
    return made


def layout(
    cin: int, widths: Sequence[int], depths: Sequence[int], width: float, alpha: float
) -> Iterator[tuple[int, int, int, float]]:
    """Yields (channels in, channels out, stride, beta) of every block; stages begin with strides 1, 2, 2, 2.

    Args:
      cin: channels after the stem.
      widths, depths: channels (to be multiplied by `width`) and blocks of each stage.
      alpha: weight of the residual branches.
    """
    stds = iter(expected_stds(depths, alpha))
    for stage, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
        for block in range(depth):
            cout = int(channels * width)
            yield cin, cout, 2 if stage and block == 0 else 1, 1 / next(stds)
            cin = cout


class Bottleneck(nnx.Module):
    """A residual block: x -> shortcut + alpha * skip_gain * (1x1 -> 3x3 -> 1x1)(beta * act(x)).

    A scaled ReLU precedes each convolution. The shortcut is x itself or, if shapes change, a 1x1
    convolution of beta * act(x), either strided or (`average`) of means over 2x2 positions.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        stride: int,
        beta: float,
        alpha: float,
        skip_gain: float,
        average: bool,
        *,
        conv,
    ):
        middle = cout // 4
        self.conv0, self.conv1 = conv(cin, middle, 1), conv(middle, middle, 3, stride=stride)
        self.conv2 = conv(middle, cout, 1)
        self.pool = stride if average else 1
        projected = stride > 1 or cin != cout
        self.shortcut = conv(cin, cout, 1, stride=stride // self.pool) if projected else None
        self.skip_gain = nnx.Param(jnp.asarray(skip_gain, jnp.float32))
        self.beta, self.alpha = beta, alpha

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Maps [batch, h, w, cin] to [batch, h', w', cout].

        `keep` [batch] is 0 for examples whose residual branch is dropped (stochastic depth), else 1.
        """
        y, skip = two_paths(x, scaled_relu, self.beta, self.shortcut, self.pool)
        y = self.conv2(scaled_relu(self.conv1(scaled_relu(self.conv0(y)))))
        return add(skip, branch(y, self.skip_gain[...] * self.alpha, keep))


def pooled(x: jax.Array, stride: int) -> jax.Array:
    """Averages over stride x stride positions; at the edge of an odd size over those that exist."""
    if stride == 1:
        return x
    size = stride, stride
    return per_view(lambda x: nnx.avg_pool(x, size, size, "SAME", count_include_pad=False))(x)


def two_paths(
    x: jax.Array, activation: Callable, beta: float, shortcut: Callable | None, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns beta * activation(x), where the branch of a block begins, and what the block adds it to.

    That is x itself or, with a `shortcut`, the shortcut of means of beta * activation(x) over stride x stride positions.
    """
    if shortcut is None:
        x, skip = fork(x)
        return times(activation(x), beta), skip
    y, skip = fork(times(activation(x), beta))
    return y, shortcut(pooled(skip, stride))


def branch(y: jax.Array, scale: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Returns y * scale in the dtype of y, and 0 for the examples that are not kept."""
    if keep is not None:
        y = per_view(lambda y, keep: y * jnp.expand_dims(keep.astype(y.dtype), (1, 2, 3)))(y, keep)
    return multiply(y, scale)


class StochasticDepth(nnx.Module):
    """Chooses the residual branches to drop: those of block i of n with probability rate * i / n.

    It acts in training mode only (`model.train()`), without rescaling, as in the paper's code. Each example
    draws its own, from the module's random stream. Networks for private training have rate 0.
    """

    def __init__(self, rate: float, blocks: int, rngs: nnx.Rngs | None):
        self.rates = tuple(rate * i / blocks for i in range(blocks))
        self.rngs = rngs if rate else None
        self.deterministic = False

    def __call__(self, index: int, batch: int) -> jax.Array | None:
        """Returns float32 [batch] of zeros and ones for block `index`, None if nothing is dropped."""
        if self.rngs is None or self.deterministic or not self.rates[index]:
            return None
        return jax.random.bernoulli(self.rngs.dropout(), 1 - self.rates[index], (batch,)).astype(jnp.float32)


def through(blocks: nnx.List, x: jax.Array, drop: StochasticDepth, remat: bool) -> jax.Array:
    """Applies all blocks to x; with `remat` each is recomputed in the backward pass."""

    def call(block, x, keep):
        return block(x, keep)

    call = nnx.remat(call) if remat else call
    for i, block in enumerate(blocks):
        x = call(block, x, drop(i, len(x)))
    return x


class NFResNet(nnx.Module):
    """NF-ResNet-50, -101, -152 or -200 (paper, section on ImageNet; pre-activation, bottleneck 1/4).

    Stem 7x7 at stride 2 to 64 channels, 3x3 max-pool at stride 2; four stages of 256, 512, 1,024 and
    2,048 channels at strides 1, 2, 2, 2; head: scaled ReLU -> mean over positions -> linear.
    NF-ResNet-50 with 1,000 classes has 25,557,048 parameters.

    Args:
      depth: 50, 101, 152 or 200, or 14 or 26 for small machines, or the number of blocks in each stage.
      num_classes: size of the output.
      width: multiplies all channels; 0.25 is a narrow network for small machines.
      alpha: weight of the residual branches.
      skip_gain: learnt gain of each branch at the start: 1 as in the paper's private runs, or 0, with
        which every block begins as its shortcut.
      stochastic_depth: rate for the last block (0: none).
      published_by: "deepmind" (the paper's), or "timm", whose networks pad symmetrically and average in
        the shortcuts; for its weights.
      remat: recompute each block in the backward pass: less memory, about a third more compute.
      dtype: of the computation (None: that of the inputs); parameters stay float32.
      rngs: for the initial parameters, and `dropout` for stochastic depth.
    Raises:
      ValueError: `depth` or `published_by` is not one of these.
    """

    def __init__(
        self,
        depth: int | Sequence[int],
        num_classes: int = 1000,
        *,
        width: float = 1.0,
        alpha: float = 0.2,
        skip_gain: float = 1.0,
        stochastic_depth: float = 0.0,
        published_by: str = "deepmind",
        remat: bool = False,
        dtype: Dtype | None = None,
        rngs: nnx.Rngs,
    ):
        if published_by not in ("deepmind", "timm"):
            raise ValueError(f"published_by must be deepmind or timm, got {published_by!r}")
        if isinstance(depth, int) and depth not in DEPTHS:
            raise ValueError(
                f"depth must be one of {', '.join(map(str, DEPTHS))}, or blocks a stage, got {depth}"
            )
        depths = DEPTHS[depth] if isinstance(depth, int) else tuple(depth)
        timm = published_by == "timm"
        self.padding = ((1, 1), (1, 1)) if timm else "SAME"  # of the max-pool
        conv = functools.partial(Conv, padding="symmetric" if timm else "SAME", dtype=dtype, rngs=rngs)
        cin = int(64 * width)
        self.stem = conv(3, cin, 7, stride=2)
        self.blocks = nnx.List(
            [
                Bottleneck(*shape, alpha, skip_gain, timm, conv=conv)
                for shape in layout(cin, WIDTHS, depths, width, alpha)
            ]
        )
        cin = int(WIDTHS[-1] * width)
        self.drop = StochasticDepth(stochastic_depth, len(self.blocks), rngs)
        self.linear = nnx.Linear(cin, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        self.remat = remat

    def features(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to the classifier's inputs, [batch, 2048 width]."""
        pool = per_view(lambda x: nnx.max_pool(x, (3, 3), (2, 2), self.padding))
        x = through(self.blocks, pool(self.stem(images)), self.drop, self.remat)
        return mean_over_positions(scaled_relu(x))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images float [batch, height, width, 3] to logits float32 [batch, num_classes]."""
        return self.linear(self.features(images).astype(self.linear.kernel[...].dtype))


def build(experiment, num_classes: int, rngs: nnx.Rngs, published_by: str = "deepmind") -> NFResNet:
    """Builds the NF-ResNet of an experiment; its branches begin with gain 1 (paper, ImageNet from scratch).

    It has no stochastic depth, which would drop the same branches in every update.
    """
    e = experiment
    given = dict(width=e.width, remat=e.remat, dtype=dtype_of(e), rngs=rngs)
    return NFResNet(e.depth, num_classes, published_by=published_by, **given)


def build_as_timm(experiment, num_classes: int, rngs: nnx.Rngs) -> NFResNet:
    """Builds the same network with timm's padding and shortcuts, for timm's weights."""
    return build(experiment, num_classes, rngs, published_by="timm")
