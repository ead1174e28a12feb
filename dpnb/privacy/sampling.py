"""Samplers, which choose the examples of each update: Poisson (exact) or the paper's shuffle (nominal).

A sampler is a pure function of (seed, step). Resuming therefore needs no state, and every process of a distributed run
draws the same examples and takes its own part of them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from dpnb.privacy.randomness import random_bytes


class Sampler(Protocol):
    """Chooses the examples of each update, as a pure function of (seed, step)."""

    @property
    def seed(self) -> int:
        """The seed from which all samples are drawn."""

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [size], each at most once."""


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Each of `n` examples enters each update independently with probability `probability`.

    Formal guarantee: to anyone who cannot tell SHAKE-256 from random bits, this is the sampling that
    `PoissonSampledDpEvent` accounts for. The true probability is never above `probability` and at most 2^-64 below it.
    Batch sizes are binomial(n, probability); a batch can be empty.

    Raises:
      ValueError: the probability is not in (0, 1].

    >>> sampler = PoissonSampler(n=10, probability=0.5, seed=0)
    >>> sampler.indices(0), sampler.indices(1)
    (array([2, 3, 4, 5, 6, 7, 9], dtype=int32), array([0, 4, 5, 6, 8], dtype=int32))
    """

    n: int
    probability: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"the sampling probability must be in (0, 1], got {self.probability}")

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step`, int32 [size], in ascending order."""
        draws = np.frombuffer(random_bytes(8 * self.n, self.seed, "poisson", int(step)), "<u8")
        if self.probability == 1:
            return np.arange(self.n, dtype=np.int32)
        return np.flatnonzero(draws < np.uint64(int(self.probability * 2.0**64))).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ShuffleSampler:
    """Fixed-size batches from a stream that is reshuffled every epoch, as in the paper's runs.

    No epsilon is proven for this sampler: Poisson accounting of a shuffled run is *nominal* (Chua et al. 2024, arXiv
    2403.17673). No example is twice in a batch, because the examples left at the end of an epoch, fewer than a batch,
    are dropped.

    Raises:
      ValueError: the batch size is not between 1 and n.

    >>> sampler = ShuffleSampler(n=5, batch_size=2, seed=0)
    >>> sampler.indices(0), sampler.indices(1)
    (array([2, 0], dtype=int32), array([3, 4], dtype=int32))
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
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
    """Cuts a logical batch into physical batches of one static size and pads the last one.

    Yields:
      (indices int32 [size], mask bool [size]); padding has index 0 and mask False. An empty logical batch yields
      nothing.

    >>> for part in physical_batches(np.array([3, 5, 8]), 2):
    ...     print(*part)
    [3 5] [ True  True]
    [8 0] [ True False]
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        mask = np.arange(size) < len(part)
        yield np.pad(part, (0, size - len(part))).astype(np.int32), mask
