"""Which examples are in this update: Poisson (exact), or the paper's shuffle (nominal).

A sampler is a pure function of (seed, step), so resuming needs no state, and every process
of a distributed run draws the same set and takes its own part of it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from dpnb.privacy.randomness import random_bytes


class Sampler(Protocol):
    """Which examples are in which update: a pure function of (seed, step)."""

    seed: int

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [size]."""


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Each of `n` examples enters each update independently with probability `probability`.

    Formal guarantee: this is the sampling that `PoissonSampledDpEvent` accounts for, for whoever cannot
    tell SHAKE-256 from random bits. The probability is never above `probability`, and below it by
    2^-64 at most; batch sizes are binomial(n, probability), zero included.
    """

    n: int
    probability: float
    seed: int

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise ValueError(f"the sampling probability must be in (0, 1], got {self.probability}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [size], ascending."""
        draws = np.frombuffer(random_bytes(8 * self.n, self.seed, "poisson", int(step)), "<u8")
        if self.probability == 1:
            return np.arange(self.n, dtype=np.int32)
        return np.flatnonzero(draws < np.uint64(int(self.probability * 2.0**64))).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ShuffleSampler:
    """Fixed-size batches from a stream reshuffled every epoch, as the paper's runs used.

    No epsilon is proven for it here: Poisson accounting of a shuffled run is *nominal*
    (Chua et al. 2024, arXiv 2403.17673). No example is twice in a batch: what is left at the end of an
    epoch, less than a batch, is dropped.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if not 0 < self.batch_size <= self.n:
            raise ValueError(f"batch_size must be between 1 and {self.n} examples, got {self.batch_size}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [batch_size], in shuffled order."""
        epoch, position = divmod(step, self.n // self.batch_size)
        start = position * self.batch_size
        return self._order(epoch)[start : start + self.batch_size].astype(np.int32)

    def _order(self, epoch: int) -> np.ndarray:
        seed = int.from_bytes(random_bytes(16, self.seed, "shuffle", epoch))
        return np.random.Generator(np.random.Philox(seed)).permutation(self.n)


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
