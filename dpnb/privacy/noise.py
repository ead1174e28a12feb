"""The Gaussian noise of one update, sampled exactly and rounded once to the grid on which gradients are summed.

Clipped gradients are integers in units of sensitivity / 2^bits (see `dpnb.gradients.clipping`), and so are their sum
and the noise. Rounding to whole units commutes with adding whole units, so that

    sum + round(Z) = round(sum + Z),    Z ~ Normal(0, std^2) real, independent in every coordinate.

What is released is therefore a function of the continuous Gaussian mechanism, whose epsilon the accountant computes.
This remains true when the integers wrap around at 2^32 and when they are converted to floats. No float is rounded
before the noise is added, so the low bits of the result reveal nothing about the sum.
"""

import dataclasses
import decimal
import math
from typing import Any

import jax
import numpy as np

from dpnb.privacy.randomness import random_bytes

MOST_BITS = 20
REACH = 16  # standard deviations; P(|Z| beyond) = 1e-57, and below 1e-46 over all samples of a run
BINS = 8  # per standard deviation
SLOTS = 4096  # size of the table from which a bin is drawn
SCALE = 378  # slots of a bin of density one
CHUNK = 2**14  # proposals that are made at a time
EXACT = decimal.Context(prec=400, Emin=-(10**6))


def grid_bits(noise_multiplier: float, expected_batch_size: float) -> int:
    """log2 of the number of grid units in the sensitivity, at most 20, chosen so that no sum wraps around.

    Ten standard deviations of the noise and of the batch size (drawn by Poisson sampling) fit in 31 bits, even if all
    gradients are equal.

    >>> grid_bits(noise_multiplier=3.0, expected_batch_size=4096)
    18
    """
    b = expected_batch_size
    most = b + 10 * math.sqrt(b) + 10 * noise_multiplier + 1
    return max(0, min(MOST_BITS, math.floor(31 - math.log2(most))))


@dataclasses.dataclass(frozen=True)
class GridNoise:
    """Draws the noise of each update, as integers in units of sensitivity / 2^bits.

    Formal guarantee: to anyone who cannot tell SHAKE-256 from random bits, the integers of all updates and
    coordinates are independent, each distributed as Normal(0, std^2) rounded to the nearest integer, with
    std >= noise_multiplier * 2^bits. The sampler is exact: floats only propose samples, and what they leave open is
    decided with as many digits as necessary (see `rounded_gaussian`).

    Args:
      seed: the seed of the run; every process draws the same noise at the same step.
      noise_multiplier: sigma > 0, the standard deviation over the sensitivity.
      bits: see `grid_bits`.
      like: pytree of arrays, or of their shapes, to which the noise is added.
    Raises:
      ValueError: sigma is not positive or not finite, or too large for 31 bits.

    >>> noise = GridNoise(seed=0, noise_multiplier=1.0, bits=10, like=np.zeros(4))
    >>> noise.std, noise(step=0)
    (1024, array([  662,   306,  -896, -1922], dtype=int32))
    """

    seed: int
    noise_multiplier: float
    bits: int
    like: Any

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf or self.std >= 2**31:
            raise ValueError(
                f"noise_multiplier must be positive and finite, at most 2^{31 - self.bits} on this grid, got "
                f"{self.noise_multiplier}"
            )

    @property
    def std(self) -> int:
        """The standard deviation before rounding, in grid units: sigma * 2^bits, rounded up to a multiple of 8."""
        return math.ceil(self.noise_multiplier * 2**self.bits / BINS) * BINS

    def __call__(self, step: int) -> Any:
        """The noise of update `step`, a pytree like `like` of int32, modulo 2^32."""
        leaves, tree = jax.tree.flatten(self.like)
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        drawn = rounded_gaussian(sum(sizes), self.std, self.seed, "noise", int(step)).astype(np.int32)
        parts = np.split(drawn, np.cumsum(sizes)[:-1])
        shaped = [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped)


def rounded_gaussian(n: int, std: int, seed: int, *label: int | str) -> np.ndarray:
    """n independent samples of Normal(0, std^2), each rounded to the nearest integer; int64 [n].

    This is exact rejection sampling. A proposal for |Z| / std falls into one of 128 bins with the probability that a
    table of whole slots gives the bin, lies uniformly within it, and is accepted with probability density / density of
    the table. Position and threshold are real numbers, of which 51 and 32 binary digits are drawn first. If these
    decide about the proposal with room for the rounding of float64, as they nearly always do, float64 is used;
    otherwise further digits are drawn and `decimal` is used. The integers are the same on every machine.

    Args:
      n: number of samples.
      std: standard deviation, a positive multiple of 8 below 2^31.
      seed, label: of the random bits, see `dpnb.privacy.randomness`.
    Raises:
      ValueError: `std` is out of range.

    >>> rounded_gaussian(5, 1024, 0, "example")
    array([  271, -2237,  3375,   -73,   741])
    """
    if std % BINS or not 0 < std < 2**31:
        raise ValueError(f"std must be a positive multiple of {BINS} below 2^31, got {std}")
    found, missing, chunk = [], n, 0
    while missing:
        size = min(CHUNK, missing + missing // 10 + 16)
        made = _accepted(size, std // BINS, seed, *label, chunk)[:missing]
        found.append(made)
        missing, chunk = missing - len(made), chunk + 1
    return np.concatenate([np.zeros(0, np.int64), *found])


def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the bin of each slot; for each bin: probability of acceptance at density one, number of slots).

    A bin has at least `SCALE` times the density at its left edge, the largest in the bin, as slots. The slots left over
    belong to the first bin.
    """
    slots = np.array([-math.floor(-SCALE * math.exp(-((j / BINS) ** 2) / 2)) for j in range(REACH * BINS)])
    slots[0] += SLOTS - slots.sum()
    return np.repeat(np.arange(len(slots)), slots), SCALE / slots, slots


_BIN, _RATIO, _SLOTS_OF = _table()


def _accepted(size: int, width: int, *stream: Any) -> np.ndarray:
    """The accepted ones among `size` proposals, int64. `width` is the number of integers in a bin."""
    bits = random_bytes(12 * size, *stream)
    first, threshold = np.frombuffer(bits, "<u8", size), np.frombuffer(bits, "<u4", size, 8 * size)
    j = _BIN[first & np.uint64(SLOTS - 1)]
    fraction = (first >> np.uint64(13)).view(np.int64)  # 51 binary digits of the position in the bin
    x = (fraction * 2.0**-51 + j) / BINS
    above = np.exp(-0.5 * x * x) * (_RATIO[j] * 2.0**32) - threshold
    accept = above >= 1.005  # the threshold has further digits; 0.005 is 1e-12 of 2^32, for rounding
    # The bin's width times the fraction, in units of 2^-26, rounded down by less than 2 + width / 2^25.
    product = width * (fraction >> 25) + ((width * (fraction & (2**25 - 1))) >> 25) + 2**25
    value = width * j + (product >> 26)
    lacks = 2 + (width >> 25) + 1
    unsure = (np.abs(above - 0.5) < 0.505) | (accept & ((product & (2**26 - 1)) >= 2**26 - lacks))
    for i in np.flatnonzero(unsure):
        accept[i], value[i] = _exactly(int(j[i]), int(fraction[i]), int(threshold[i]), width, *stream, int(i))
    negative = (first >> np.uint64(12)) & np.uint64(1)
    return np.where(negative, -value, value)[accept]


def _exactly(j: int, fraction: int, threshold: int, width: int, *stream: Any) -> tuple[bool, int]:
    """(whether a proposal is accepted, its value), from as many further binary digits as necessary."""
    for more in (64, 256, 1024):
        x, u = (int.from_bytes(random_bytes(more // 8, *stream, which)) for which in "xu")
        x, u = (fraction << more) + x, (threshold << more) + u  # the first digits; the last are still open
        high, low = (_limit(j, x + end, more) for end in (0, 1))
        if u >= high:
            return False, 0
        unit = 2 ** (51 + more)
        values = {width * j + (2 * width * (x + end) + unit) // (2 * unit) for end in (0, 1)}
        if u + 1 <= low and len(values) == 1:
            return True, values.pop()
    raise ArithmeticError("1,024 binary digits left a sample open: the random bits are not random")


def _limit(j: int, x: int, more: int) -> decimal.Decimal:
    """At position x / 2^(51 + more) of bin j, thresholds of 32 + `more` digits are accepted below this limit."""
    d = decimal.Decimal
    position = EXACT.divide(d((j << (51 + more)) + x), d(BINS << (51 + more)))
    density = EXACT.exp(EXACT.divide(EXACT.multiply(position, -position), d(2)))
    return EXACT.divide(EXACT.multiply(density, d(SCALE << (32 + more))), d(int(_SLOTS_OF[j])))
