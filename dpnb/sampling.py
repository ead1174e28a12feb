"""Which examples are in this update: Poisson (exact), or the paper's shuffle (nominal).

A sampler is a pure function of (seed, step), so resuming needs no state, and every process
of a distributed run draws the same set and takes its own part of it.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

_POISSON, _SHUFFLE = 0x506F69, 0x536875  # keeps the streams of the two samplers apart


def _generator(seed: int, stream: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, step])))


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Each of `n` examples enters each update independently with probability `probability`.

    Formal guarantee: this is the sampling that `PoissonSampledDpEvent` accounts for. The
    probability is exact to 2^-53; batch sizes are binomial(n, probability), zero included.
    """

    n: int
    probability: float
    seed: int

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise ValueError(f"the sampling probability must be in (0, 1], got {self.probability}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [size], ascending."""
        draws = _generator(self.seed, _POISSON, step).random(self.n)
        return np.flatnonzero(draws < self.probability).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """Fixed-size batches from a stream reshuffled every epoch, as the paper's runs used.

    No epsilon is proven for it here: Poisson accounting of a shuffled run is *nominal*
    (Chua et al. 2024, arXiv 2403.17673). The stream crosses epoch borders.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if not 0 < self.batch_size <= self.n:
            raise ValueError(f"batch_size must be between 1 and {self.n} examples, got {self.batch_size}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [batch_size], in shuffled order."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.n
        order = {e: _generator(self.seed, _SHUFFLE, int(e)).permutation(self.n) for e in np.unique(epochs)}
        return np.array([order[e][p % self.n] for e, p in zip(epochs, positions, strict=True)], np.int32)


def physical_batches(indices: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a logical batch into physical ones of one static size, the last one padded.

    Yields:
      (indices int32 [size], mask bool [size]); padding has index 0 and mask False. Nothing
      for an empty logical batch.
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        mask = np.arange(size) < len(part)
        yield np.pad(part, (0, size - len(part))).astype(np.int32), mask
