"""Decides which physical batches are read ahead of the device, and how many cores there are to do it."""

import bisect
import functools
import multiprocessing.connection
import os
import threading

import numpy as np

from dpnb.privacy import sampling

READ_AHEAD = 2**31  # bytes of decoded photographs at most, two batches at least


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def end_with_parent(index: int = 0, workers: int = 1) -> None:
    """Makes this worker process end when the one that started it does, however that ends.

    Else it would wait for ever, and keep the memory that both share.

    Args:
      index, workers: which of how many it is, unused; Grain passes them.
    """

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class GivenBatches:
    """A data source of given arrays of indices, none of them padding: (indices, mask) by number."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.size = parts, max(map(len, parts), default=1)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self.parts[number], np.ones(len(self.parts[number]), bool)


class Plan:
    """A data source of a run's physical batches in a row, (indices, mask) by number, drawn when needed.

    Readers ask for neighbouring numbers in any order, so the last few updates are kept.

    Args:
      sampler: has `indices(step)`, see `dpnb.privacy.sampling`.
      size: examples in a physical batch.
      first: the update that batch 0 belongs to.
    """

    def __init__(self, sampler, size: int, first: int):
        self.sampler, self.size, self.first = sampler, size, first
        self.begins, self.lock = [0], threading.Lock()  # the number of each update's first batch
        self.parts = functools.lru_cache(maxsize=16)(self._parts)

    def __reduce__(self):
        return type(self), (self.sampler, self.size, self.first)

    def _parts(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return list(sampling.physical_batches(self.sampler.indices(step), self.size))

    def __len__(self) -> int:
        return 2**62  # more than will ever be asked for

    def step_of(self, number: int) -> int:
        """Returns the update that physical batch `number` belongs to."""
        with self.lock:
            while self.begins[-1] <= number:
                step = self.first + len(self.begins) - 1
                self.begins.append(self.begins[-1] + len(self.parts(step)))
            return self.first + bisect.bisect_right(self.begins, number) - 1

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step = self.step_of(number)
        return self.parts(step)[number - self.begins[step - self.first]]
