"""Makes K random views of one image, on the device (augmentation multiplicity, paper section 3.2).

Under DP-SGD the K views of an example share one clipped gradient, so that augmentation costs
no privacy: `dpnb.gradients.clipping.clipped_grad` takes the mean of the loss over them before it clips.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpnb.data.recipe import SMALL_IMAGES, Recipe

PAD = 4  # pixels mirrored on every side before the crop


def normalise(images, recipe: Recipe = SMALL_IMAGES) -> jax.Array:
    """Returns (x / 255 - mean) / std for each colour.

    Args:
      images: uint8 [..., h, w, 3], any number of leading axes.
    Returns:
      float32 [..., h, w, 3], about -2 to 2.6.
    Raises:
      ValueError: the images are not uint8 (so nothing is normalised twice), or do not have three colours.
    """
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(
            "images must be uint8 [..., height, width, 3] with values 0 to 255, got "
            f"{images.dtype} {list(images.shape)}; normalise the raw images, once, in that layout"
        )
    shape = (1,) * (images.ndim - 1) + (3,)
    mean, std = (jnp.asarray(c, jnp.float32).reshape(shape) for c in (recipe.mean, recipe.std))
    return (jnp.asarray(images).astype(jnp.float32) / 255 - mean) / std


def plain(inputs, recipe: Recipe = SMALL_IMAGES) -> jax.Array:
    """Returns what a network reads without augmentation: normalised images, or float32 features unchanged."""
    return inputs if inputs.dtype == np.float32 else normalise(inputs, recipe)


def denormalise(images, recipe: Recipe = SMALL_IMAGES) -> jax.Array:
    """Inverts `normalise`, for display: float [..., h, w, 3] -> uint8, rounded."""
    mean, std = (jnp.asarray(c, jnp.float32) for c in (recipe.mean, recipe.std))
    pixels = (images * std + mean) * 255
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def views(key, image, augmult: int, recipe: Recipe = SMALL_IMAGES) -> jax.Array:
    """Draws K independent random views of one image, normalised (paper, section 3.2 and its code).

    A view of a photograph (`recipe.crop`) is a random square of that size, mirrored left-right with
    probability 1/2.  Otherwise a view is the image padded by 4 mirrored pixels on every side (edge row
    included, numpy's "symmetric"), mirrored left-right with probability 1/2 and cropped to its own size at
    one of the 9 x 9 positions, all equally likely.  Flipping before the crop gives the same distribution as
    flipping after it, and normalising last gives the same numbers as normalising first.

    Args:
      key: PRNG key for this example and this update.  For a batch:
        `jax.vmap(views, (0, 0, None))(keys, images, K)`.
      image: uint8 [h, w, 3]; with K = 0 also float32 features of any shape.
      augmult: K, static.  0 gives the plain input (as in evaluation), 1 ordinary augmentation.
    Returns:
      float32 [max(K, 1), h, w, 3], or [..., crop, crop, 3].
    Raises:
      ValueError: K is negative, or the image has another shape or dtype.

    >>> import jax, numpy as np
    >>> views(jax.random.key(0), np.zeros((32, 32, 3), np.uint8), 16).shape
    (16, 32, 32, 3)
    """
    if augmult < 0:
        raise ValueError(f"augmult must be 0 (no augmentation) or the number of views, got {augmult}")
    if augmult == 0:
        return plain(image, recipe)[None]
    if image.ndim != 3:
        raise ValueError(f"image must be one image [h, w, 3], got {list(image.shape)}; vmap over examples")
    if recipe.crop:
        whole, (h, w) = jnp.asarray(image), (recipe.crop, recipe.crop)
    else:
        whole, (h, w) = jnp.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="symmetric"), image.shape[:2]
    room = whole.shape[0] - h + 1  # the same on both axes: photographs are squares
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (augmult, 2), 0, room, jnp.int32)
    flips = jax.random.bernoulli(flip_key, shape=(augmult,)).astype(jnp.int32)
    both = jnp.stack([whole, whole[:, ::-1]])  # [flipped?, height, width, 3]

    def crop(flip, offset):
        # One contiguous copy for each view: faster than index arrays or a select after the crop.
        start = (flip, offset[0], offset[1], jnp.int32(0))
        return jax.lax.dynamic_slice(both, start, (1, h, w, 3))[0]

    return normalise(jax.vmap(crop)(flips, offsets), recipe)
