"""Images drawn from random processes on the device: they show no person and need no licence.

They serve to pre-train without any real public image (Baradad et al. 2021, *Learning to see by looking at
noise*; Tang et al. 2023 for private training). Each class is one process with its own parameters, each image
is one draw from it, and the task is to tell the processes apart. There are three families:

- dead leaves (Lee, Mumford & Huang 2001): opaque shapes that fall on one another, with edges and
  occlusion as in photographs; a class has its own shape, size, direction and grain;
- random phase: stationary noise; a class has its own slope, direction and stretch of the spectrum;
- wavelets: sparse Gabor waves; a class has its own frequency, direction and density.

Colours are drawn anew for every image, so that they do not reveal the class.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpnb.data.dataset import Dataset, Split

SIZE = 32
FAMILIES = ("dead leaves", "random phase", "wavelets")
LEAVES, WAVES = 40, 40  # at most, in one image
BATCH = 500  # images drawn at once


def dataset(
    classes: int = 192, train: int = 60_000, test: int = 3_000, seed: int = 0, families=FAMILIES
) -> Dataset:
    """Draws random images uint8 [n, 32, 32, 3], labelled with the number of the process that made each.

    Args:
      classes: number of processes, the families in turn.
      train, test: number of images, the processes in turn.
      seed: of processes and images.
      families: some of `FAMILIES`.
    """
    made, labels = _images(families, classes, train + test, seed), np.arange(train + test) % classes
    kinds = len(families)
    names = [f"{families[c % kinds]} {c // kinds}" for c in range(classes)]
    splits = Split(made[:train], labels[:train]), Split(made[train:], labels[train:])
    name = "textures" if kinds > 1 else families[0].replace(" ", "-")
    return Dataset(name, *splits, names, "images of random processes: nobody's data")


def only_dead_leaves() -> Dataset:
    """Draws 40,000 images of dead leaves, from 1,000 processes: of the families the most like photographs."""
    return dataset(1000, 40_000, 1000, families=FAMILIES[:1])


def _images(families, classes: int, n: int, seed: int) -> np.ndarray:
    processes, images = jax.random.split(jax.random.key(seed))
    made = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for place, name in enumerate(families):
        family = FAMILIES.index(name)
        numbers = np.flatnonzero(np.arange(n) % classes % len(families) == place)
        for start in range(0, len(numbers), BATCH):
            some = numbers[start : start + BATCH]
            padded = np.pad(some, (0, BATCH - len(some)))  # one shape, so one compilation
            made[some] = draw(family, processes, images, padded % classes, padded)[: len(some)]
    return made


@functools.partial(jax.jit, static_argnums=0)
def draw(family: int, processes, images, labels, numbers) -> jax.Array:
    """Draws the images with these numbers from the processes `labels`: uint8 [n, 32, 32, 3].

    Args:
      family: an index of `FAMILIES`.
      processes, images: PRNG keys for the parameters of the classes, and for what differs between images.
      labels, numbers: int [n].
    """
    one = (dead_leaves, random_phase, wavelets)[family]
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    pixels = jax.vmap(one)(fold(processes, labels), fold(images, numbers))
    return jnp.clip(255 * pixels, 0, 255).astype(jnp.uint8)


def dead_leaves(process, image) -> jax.Array:
    """Draws `LEAVES` superellipses, each hiding what lies below it: float32 [32, 32, 3], about 0 to 1.

    Args:
      process, image: PRNG keys for the parameters of the class, and for what differs between images.
    """
    u = jax.random.uniform(process, (7,))
    angle, spread = jnp.pi * u[0], 1.5 * u[1] ** 2
    power = jnp.exp2(1.5 * u[2] + 0.2)  # 2: an ellipse, less: a star or a diamond, more: a box
    largest, slope, stretch = 4 + 12 * u[3], 1 + 2 * u[4], 1 + 3 * u[5] ** 2
    grain = 0.2 * u[6] ** 2
    keys = jax.random.split(image, 7)
    centre = jax.random.uniform(keys[0], (LEAVES, 2), minval=-4, maxval=SIZE + 4)
    radius = largest * jax.random.uniform(keys[1], (LEAVES,), minval=0.15) ** slope + 1
    turn = angle + spread * jax.random.normal(keys[2], (LEAVES,))
    colours = _colours(keys[3], LEAVES + 1)
    waves = jax.random.normal(keys[4], (LEAVES, 2)) * jax.random.uniform(keys[5], (LEAVES, 1), maxval=2.0)
    texture = 0.5 * grain * _noise(keys[6], 1.0, 0.0, 1.0)

    def fall(below, leaf):
        centre, radius, turn, colour, wave = leaf
        x, y = (p - c for p, c in zip(_grid(), centre, strict=True))
        along, across = x * jnp.cos(turn) + y * jnp.sin(turn), y * jnp.cos(turn) - x * jnp.sin(turn)
        distance = jnp.abs(along / (radius * stretch)) ** power + jnp.abs(across / radius) ** power
        cover = jax.nn.sigmoid(2 * radius * (1 - distance))[..., None]
        shade = grain * jnp.sin(wave[0] * along + wave[1] * across)[..., None]
        return cover * (colour + shade) + (1 - cover) * below, None

    ground = jnp.broadcast_to(colours[-1], (SIZE, SIZE, 3))
    made, _ = jax.lax.scan(fall, ground, (centre, radius, turn, colours[:-1], waves))
    return made + texture[..., None]


def random_phase(process, image) -> jax.Array:
    """Draws two layers of noise with one spectrum, in two colours each: float32 [32, 32, 3], about 0 to 1.

    Args: as for `dead_leaves`.
    """
    u = jax.random.uniform(process, (4,))
    keys = jax.random.split(image, 4)
    slope, angle, stretch = 0.5 + 2.5 * u[0], jnp.pi * u[1], jnp.exp(2 * u[2])
    first, second = (_noise(k, slope, angle, stretch) for k in keys[:2])
    colours = _colours(keys[2], 3)
    sharp = jnp.exp(4 * u[3] - 1)  # up to hard borders between two colours
    mixed = colours[0] + (colours[1] - colours[0]) * jax.nn.sigmoid(sharp * first)[..., None]
    return mixed + 0.3 * second[..., None] * (colours[2] - 0.5)


def wavelets(process, image) -> jax.Array:
    """Draws a few to many Gabor waves on a plain ground: float32 [32, 32, 3], about 0 to 1.

    Args: as for `dead_leaves`.
    """
    u = jax.random.uniform(process, (6,))
    keys = jax.random.split(image, 7)
    frequency, angle, spread = 0.3 + 1.7 * u[0], jnp.pi * u[1], 1.5 * u[2] ** 2
    width, stretch, density = 1.5 + 4 * u[3], 1 + 2 * u[4], 0.1 + 0.9 * u[5]
    centre = jax.random.uniform(keys[0], (WAVES, 2), maxval=SIZE)
    turn = angle + spread * jax.random.normal(keys[1], (WAVES,))
    phase = jax.random.uniform(keys[2], (WAVES,), maxval=2 * jnp.pi)
    there = jax.random.bernoulli(keys[3], density, (WAVES,))
    strength = there * jax.random.normal(keys[4], (WAVES,))
    colours = _colours(keys[5], WAVES) - 0.5

    def add(below, wave):
        centre, turn, phase, strength, colour = wave
        x, y = (p - c for p, c in zip(_grid(), centre, strict=True))
        along, across = x * jnp.cos(turn) + y * jnp.sin(turn), y * jnp.cos(turn) - x * jnp.sin(turn)
        envelope = jnp.exp(-(along**2 + (across / stretch) ** 2) / (2 * width**2))
        bump = strength * envelope * jnp.cos(frequency * along + phase)
        return below + 1.2 * bump[..., None] * colour, None

    ground = jnp.broadcast_to(_colours(keys[6], 1)[0], (SIZE, SIZE, 3))
    return jax.lax.scan(add, ground, (centre, turn, phase, strength, colours))[0]


def _grid():
    x = jnp.arange(SIZE, dtype=jnp.float32)
    return jnp.meshgrid(x, x, indexing="ij")


def _colours(key, n: int) -> jax.Array:
    """Draws a palette for one image, float32 [n, 3]: colours around one, mostly light against dark."""
    middle, light, hue, contrast = jax.random.split(key, 4)
    spread = jax.random.uniform(contrast, (2,), minval=0.05, maxval=0.35)
    centre = 0.5 + 0.15 * jax.random.normal(middle, (3,))
    return (
        centre
        + spread[0] * jax.random.normal(light, (n, 1))
        + 0.5 * spread[1] * jax.random.normal(hue, (n, 3))
    )


def _noise(key, slope, angle, stretch) -> jax.Array:
    """Draws noise float32 [32, 32], mean 0, standard deviation 1, with amplitudes 1 / frequency^slope."""
    f = jnp.asarray(np.fft.fftfreq(SIZE), jnp.float32)
    x, y = jnp.meshgrid(f, f, indexing="ij")
    along, across = x * jnp.cos(angle) + y * jnp.sin(angle), y * jnp.cos(angle) - x * jnp.sin(angle)
    radius = jnp.maximum(jnp.hypot(along * stretch, across / stretch), 1 / SIZE)
    amplitude = (radius**-slope).at[0, 0].set(0)
    noise = jnp.fft.ifft2(jnp.fft.fft2(jax.random.normal(key, (SIZE, SIZE))) * amplitude).real
    return noise / noise.std()
