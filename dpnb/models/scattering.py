"""The wavelet scattering transform (Bruna & Mallat 2013; Oyallon & Mallat 2015): features without training.

It has two layers of Morlet wavelets, moduli and local means, with J = 2 and 8 angles. Tramer & Boneh 2021
train a linear layer on it, which beats the networks of the paper at epsilon = 1 without any learnt feature.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WORDS = "log scattering J=2 L=8, standardised by random images and image"  # hashed: never changed
CHANNELS = 81  # 1 mean, 2 scales x 8 angles, and 8 x 8 pairs of angles


def gabor(size: int, sigma: float, theta: float, xi: float, slant: float) -> np.ndarray:
    """Returns a Gaussian of width `sigma` times a wave of frequency `xi` along `theta`.

    It is complex128 [size, size] and periodic; `slant` is the ratio of the Gaussian's two axes. With slant 1
    and xi 0 its sum is 1.
    """
    rotate = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    curve = rotate @ np.diag([1.0, slant**2]) @ rotate.T / (2 * sigma**2)
    total = np.zeros((size, size), complex)
    for shift_x in range(-2, 3):
        for shift_y in range(-2, 3):
            x, y = np.meshgrid(
                np.arange(size) + shift_x * size, np.arange(size) + shift_y * size, indexing="ij"
            )
            exponent = curve[0, 0] * x**2 + (curve[0, 1] + curve[1, 0]) * x * y + curve[1, 1] * y**2
            total += np.exp(-exponent + 1j * xi * (x * math.cos(theta) + y * math.sin(theta)))
    return total * slant / (2 * math.pi * sigma**2)


def morlet(size: int, sigma: float, theta: float, xi: float, slant: float) -> np.ndarray:
    """Returns a Gabor wave minus the Gaussian that makes its sum zero, complex128 [size, size]."""
    wave, bump = gabor(size, sigma, theta, xi, slant), gabor(size, sigma, theta, 0.0, slant)
    return wave - wave.sum() / bump.sum() * bump


def dft2(values, inverse: bool = False) -> jax.Array:
    """Computes the discrete Fourier transform, or its inverse, over the last two axes, of equal length.

    It is a product of real matrices and not `jnp.fft`, in which XLA on CPUs can wait for itself forever:
    its FFT hands parts of its work to threads that are waiting in other FFTs (seen with JAX 0.11.2).

    Args:
      values: float32 or complex64 [..., n, n].
    Returns:
      complex64 [..., n, n].
    """
    n = values.shape[-1]
    turn = np.fft.ifft(np.eye(n)) if inverse else np.fft.fft(np.eye(n))
    turn = np.block([[turn.real, turn.imag], [-turn.imag, turn.real]]).astype(np.float32)
    for _ in range(2):  # rows, then columns, which the transposition makes rows
        if jnp.iscomplexobj(values):
            values = jnp.concatenate([values.real, values.imag], -1)
        rows = jnp.matmul(values, turn[: values.shape[-1]], precision="highest")
        values = jnp.swapaxes(jax.lax.complex(rows[..., :n], rows[..., n:]), -1, -2)
    return values


@functools.cache
def filters(size: int, angles: int = 8) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns Fourier transforms of low pass [size, size] and wavelets [angles, size, size] of each scale."""
    low = np.fft.fft2(gabor(size, 0.8 * 2, 0.0, 0.0, 1.0)).real
    turns = [(angles - angles // 2 - 1 - k) * math.pi / angles for k in range(angles)]
    scales = [
        np.stack(
            [
                np.fft.fft2(morlet(size, 0.8 * 2**j, turn, 0.75 * math.pi / 2**j, 4 / angles)).real
                for turn in turns
            ]
        )
        for j in range(2)
    ]
    return low, scales


def scattering(images) -> jax.Array:
    """Computes the scattering coefficients of one-channel images.

    Args:
      images: float32 [batch, size, size], size a multiple of 4.
    Returns:
      float32 [batch, size / 4, size / 4, 81].
    Raises:
      ValueError: the images have another shape.
    """
    size = images.shape[-1]
    if images.ndim != 3 or images.shape[1] != size or size % 4:
        raise ValueError(
            f"images must be [batch, size, size], size a multiple of 4, got {list(images.shape)}"
        )
    low, (fine, coarse) = filters(size + 8)
    as32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    u0 = dft2(padded)[:, None]

    def mean(u, every):  # [batch, paths, n, n] in Fourier space -> its local means, 4 pixels apart
        return dft2(folded(u * as32(coarser(low, 4 // every)), every), inverse=True).real[..., 1:-1, 1:-1]

    u1_fine = dft2(jnp.abs(dft2(u0 * as32(fine), inverse=True)))  # scale 0: every pixel
    u1_coarse = dft2(jnp.abs(dft2(folded(u0 * as32(coarse), 2), inverse=True)))  # scale 1: every second
    pairs = folded(u1_fine[:, :, None] * as32(coarse), 2)
    u2 = dft2(jnp.abs(dft2(pairs, inverse=True))).reshape(len(images), -1, *pairs.shape[-2:])
    parts = [mean(u0, 4), mean(u1_fine, 4), mean(u1_coarse, 2), mean(u2, 2)]
    return jnp.moveaxis(jnp.concatenate(parts, 1), 1, -1).astype(jnp.float32)


def folded(spectrum, every: int):
    """Returns the spectrum of every `every`-th pixel in both directions, by averaging aliases."""
    *lead, n, _ = spectrum.shape
    m = n // every
    return spectrum.reshape(*lead, every, m, every, m).mean((-4, -2))


def coarser(spectrum: np.ndarray, every: int) -> np.ndarray:
    """Returns the low frequencies of a filter, for images of every `every`-th pixel."""
    half = len(spectrum) // every // 2
    kept = np.r_[0:half, len(spectrum) - half : len(spectrum)]
    return spectrum[np.ix_(kept, kept)]


def logarithms(images) -> jax.Array:
    """Computes the scattering of each colour: wavelet coefficients as log(0.01 + s), means unchanged.

    The logarithm tames the heavy tails, so clipping changes the direction of fewer gradients.

    Args:
      images: uint8 [batch, size, size, 3].
    Returns:
      float32 [batch, size / 4, size / 4, 3, 81].
    """
    pixels = jnp.moveaxis(jnp.asarray(images).astype(jnp.float32) / 255, -1, 1)
    batch, colours, size, _ = pixels.shape
    s = scattering(pixels.reshape(-1, size, size))
    s = jnp.concatenate([s[..., :1], jnp.log(0.01 + jnp.maximum(s[..., 1:], 0))], -1)
    return jnp.moveaxis(s.reshape(batch, colours, size // 4, size // 4, CHANNELS), 1, 3)


def random_images(count: int, size: int = 32) -> np.ndarray:
    """Returns noise with the spectrum of photographs (amplitude 1 / frequency, colours correlated 0.9).

    It is the same uint8 [count, size, size, 3] on every call.
    """
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))
    spectrum = 1 / np.maximum(np.hypot(x, y), 1 / size)
    white = random.standard_normal((count, 3, size, size))
    noise = np.fft.ifft2(np.fft.fft2(white) * spectrum).real
    mix = np.linalg.cholesky(np.full((3, 3), 0.9) + 0.1 * np.eye(3))
    noise = np.einsum("ij,njxy->nxyi", mix, noise)
    return (255 * np.clip(0.47 + 0.25 * noise / noise.std(), 0, 1)).astype(np.uint8)


@functools.cache
def standards(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the 81 channels, float32 [81], over random images, not data.

    Tramer & Boneh release those of the data with noise, for part of the budget; these cost none.
    """
    coefficients = np.asarray(jax.jit(logarithms)(random_images(500, size)))
    return coefficients.mean((0, 1, 2, 3)), coefficients.std((0, 1, 2, 3))


def features(images, mean, std) -> jax.Array:
    """Computes standardised logarithms of scattering coefficients, each image with mean 0 and variance 1.

    Args:
      images: uint8 [batch, size, size, 3].
      mean, std: float32 [81], of the channels, from `standards()`.
    Returns:
      float32 [batch, size / 4, size / 4, 243]; row i is a function of image i alone.
    """
    s = (logarithms(images) - mean) / std
    s = jax.nn.standardize(s, axis=(1, 2, 3, 4))
    return s.reshape(*s.shape[:3], -1)


@jax.custom_vjp
def linear(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies inputs [batch, features] by kernel [classes, features] to [batch, classes].

    The gradient of a single row is written as a product and not as a matrix multiplication, so XLA
    does not store it but fuses it into the norm and the clipped sum of `dpnb.gradients.clipping`.
    """
    return inputs @ kernel.T


def _backward(residuals, cotangent):
    inputs, kernel = residuals
    single = len(inputs) == 1
    change = cotangent[0][:, None] * inputs[0] if single else cotangent.T @ inputs
    return cotangent @ kernel, change


linear.defvjp(lambda *args: (linear(*args), args), _backward)


class ScatterLinear(nnx.Module):
    """A linear layer on fixed features (default: scattering of 32x32 images); parameters start at zero."""

    def __init__(self, num_classes: int = 10, shape: tuple[int, ...] = (8, 8, 3 * CHANNELS)):
        self.kernel = nnx.Param(jnp.zeros((num_classes, math.prod(shape))))
        self.bias = nnx.Param(jnp.zeros(num_classes))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps features float32 [batch, *shape] to logits [batch, num_classes]."""
        return linear(inputs.reshape(len(inputs), -1), self.kernel[...]) + self.bias[...]


def build(experiment, num_classes: int, rngs: nnx.Rngs) -> ScatterLinear:
    """Builds the linear layer of an experiment, for `dpnb.models.registry`."""
    return ScatterLinear(num_classes)


@functools.lru_cache  # compiled once for all cells and their verification
def make_transform(side: int) -> Callable[[jax.Array], jax.Array]:
    """Returns `features` with `standards(side)`: uint8 [batch, side, side, 3] -> float32 [batch, ...]."""
    mean, std = standards(side)
    return jax.jit(functools.partial(features, mean=mean, std=std))
