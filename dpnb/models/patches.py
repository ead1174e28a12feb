"""Features of patches, learnt without labels (after Coates & Ng 2012), and a linear layer on them.

Filters at two scales answer to patches of equal contrast; means of the answers over quarters of the image are
whitened. That is all: no layer is trained by a gradient. `dpnb.models.weights.patches` learns filters and whitening from
public images, random textures for example, so that the private images only train the last layer.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpnb.data import augment

SIZE = 6  # pixels of a patch
SCALES = (1, 2)  # an image as it is, and at half its size
FILTERS, FEATURES = 192, 1024  # at width 1: filters at each scale, and numbers that the last layer reads
CONTRAST = 10.0  # added to a patch's variance, on the scale of 0 to 255: a flat patch stays small
THRESHOLD = 0.1  # an answer below it, of either sign, counts as none


def patch_scales(pixels: jax.Array) -> jax.Array:
    """Returns what every patch is divided by, its standard deviation with `CONTRAST` added to the variance.

    Args:
      pixels: float32 [batch, h, w, 3], 0 to 255.
    Returns:
      float32 [batch, h - 5, w - 5, 1].
    """
    centred = pixels - 127.5  # so that less is lost in the difference below
    box = jnp.full((SIZE, SIZE, 3, 1), 1 / (3 * SIZE**2))
    variance = _convolve(centred**2, box) - _convolve(centred, box) ** 2
    return jnp.sqrt(jnp.maximum(variance, 0) + CONTRAST)


def shrink(pixels: jax.Array, by: int) -> jax.Array:
    """Averages squares of `by` x `by` pixels: [batch, h, w, 3] -> [batch, h / by, w / by, 3]."""
    batch, h, w, colours = pixels.shape
    return pixels.reshape(batch, h // by, by, w // by, by, colours).mean((2, 4))


class Bank(nnx.Module):
    """Filters at one scale: means of their answers over quarters of the image.

    Each filter has a mirrored twin, and the features are those of the image and of its mirror image, averaged,
    at the price of one of them. A kernel sums to zero, so it does not see a patch's mean.
    """

    def __init__(self, filters: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.params.normal((SIZE, SIZE, 3, filters)) / SIZE)
        self.bias = nnx.Param(jnp.zeros(filters))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps pixels float32 [batch, h, w, 3] to float32 [batch, 8 filters]."""
        kernel, bias = self.kernel[...], self.bias[...]
        both = jnp.concatenate([kernel, kernel[:, ::-1]], -1)
        answers = _convolve(pixels, both) / patch_scales(pixels) + jnp.concatenate([bias, bias])
        parts = [self._halves(nnx.relu(sign * answers - THRESHOLD)) for sign in (1, -1)]
        return jnp.sqrt(jnp.concatenate(parts, 1))

    def _halves(self, answers: jax.Array) -> jax.Array:
        """Averages over quarters, and over the mirror images: the left half then says all, [batch, 4 filters]."""
        batch, h, w, twins = answers.shape
        size, step = (
            ((h + 1) // 2, (w + 1) // 2),
            (h // 2, w // 2),
        )  # quarters share the middle of an odd side
        sums = jax.lax.reduce_window(answers, 0.0, jax.lax.add, (1, *size, 1), (1, *step, 1), "VALID")
        left, right = sums[:, :, 0], jnp.roll(sums[:, :, 1], twins // 2, -1)
        return (left + right).reshape(batch, -1) / (2 * math.prod(size))


class PatchLinear(nnx.Module):
    """A linear layer on whitened features of patches; it starts at zero.

    Args:
      filters, features: see `FILTERS`; features are at most 16 times as many.
      rngs: for filters and whitening that nothing was learnt for.
    """

    def __init__(
        self,
        num_classes: int = 10,
        filters: int = FILTERS,
        features: int = FEATURES,
        *,
        rngs: nnx.Rngs,
    ):
        size = 8 * filters * len(SCALES)
        self.banks = nnx.List([Bank(filters, rngs) for _ in SCALES])
        self.mean = nnx.Param(jnp.zeros(size))
        self.whitening = nnx.Param(rngs.params.normal((size, features)))
        zero = nnx.initializers.zeros
        self.linear = nnx.Linear(features, num_classes, kernel_init=zero, rngs=rngs)

    def answers(self, pixels: jax.Array) -> jax.Array:
        """Maps pixels float32 [batch, h, w, 3], 0 to 255, to what is whitened, float32 [batch, 16 filters]."""
        scaled = zip(self.banks, SCALES, strict=True)
        return jnp.concatenate([bank(shrink(pixels, by)) for bank, by in scaled], 1)

    def features(self, images: jax.Array) -> jax.Array:
        """Maps normalised images float [batch, h, w, 3] to features of mean square 1, float32 [batch, features].

        Their lengths are equal, so clipping shortens a gradient for its error alone.
        """
        pixels = 255 * (images * np.float32(augment.SMALL_IMAGES.std) + np.float32(augment.SMALL_IMAGES.mean))
        white = (self.answers(pixels) - self.mean[...]) @ self.whitening[...]
        return white * jax.lax.rsqrt(jnp.square(white).mean(1, keepdims=True) + 1e-12)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalised images float [batch, h, w, 3] to logits float32 [batch, num_classes]."""
        return self.linear(self.features(images))


def build(experiment, num_classes: int, rngs: nnx.Rngs) -> PatchLinear:
    """Builds the network of an experiment, for `dpnb.models.registry`."""
    filters, features = (int(n * experiment.width) for n in (FILTERS, FEATURES))
    return PatchLinear(num_classes, filters, features, rngs=rngs)


def _convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=layout)
