"""Moves physical batches to the devices, from memory or read ahead from disk."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dpnb.data import Dataset, Photographs
from dpnb.data.sources import name_unreadable
from dpnb.privacy import sampling
from dpnb.training.sharding import batch_sharding, put, replicated


class Feed(Protocol):
    """Holds the training images, and moves them to the devices.

    A trainer owns one feed and one sampler. The feed borrows the sampler for a call of `batches`, as reading
    ahead has to know which examples the next updates will draw.
    """

    resident: bool  # whether the whole data set lies on every device, and a batch is indices into it

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """Yields (images, labels, indices, mask) of each physical batch of update `step`, for `accumulate`.

        Args:
          sampler: decides which examples are in which update.
          size: examples in a physical batch, over all devices.
        """

    def blank(self, size: int) -> tuple:
        """Returns a physical batch of padding alone."""


class InMemoryBatches:
    """Keeps the whole split on every device; a batch is indices into it.

    images: uint8 [n, h * w * c] (or float32 features), an image in a row, since compilers for TPUs copy arrays of
    more axes to another layout in every call; labels: int32 [n].
    """

    resident = True

    def __init__(self, split, mesh: Mesh):
        self.mesh = mesh
        rows = split.images.reshape(len(split.images), -1)
        self.images, self.labels = (put(x, replicated(mesh)) for x in (rows, split.labels))

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """See `Feed.batches`."""
        for indices, mask in sampling.physical_batches(sampler.indices(step), size):
            yield self.batch(indices, mask)

    def batch(self, indices: np.ndarray, mask: np.ndarray) -> tuple:
        """Returns the batch of these examples, with indices and mask divided over the devices."""
        return self.images, self.labels, *(put(x, batch_sharding(self.mesh)) for x in (indices, mask))

    def blank(self, size: int) -> tuple:
        """Returns a physical batch of padding alone."""
        return self.batch(np.zeros(size, np.int32), np.zeros(size, bool))


@dataclasses.dataclass
class StreamedBatches:
    """Reads photographs from disk ahead of the devices; each process reads the rows of its own devices."""

    photographs: Photographs
    mesh: Mesh

    resident = False

    def __post_init__(self):
        self.prefetched, self.next_call, self.lookahead, self.named = None, None, None, set()

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """See `Feed.batches`; unreadable images are named in a warning, once, and have the label -1."""
        if self.next_call != (step, size, sampler):  # the first call, or not the one expected next
            self.lookahead, self.prefetched = (
                None,
                self.photographs.stream(sampler, size, self._rows(size), step),
            )
        self.next_call = None  # until this update has been read to its end
        while True:
            at, batch = self.lookahead or next(self.prefetched)
            self.lookahead = None
            if at > step:
                self.lookahead = at, batch
                break
            name_unreadable(batch.unreadable, self.named)
            yield tuple(
                jax.make_array_from_process_local_data(batch_sharding(self.mesh), x)
                for x in (batch.images, batch.labels, batch.indices, batch.mask)
            )
        self.next_call = (step + 1, size, sampler)

    def blank(self, size: int) -> tuple:
        """Returns a physical batch of padding alone."""
        side = self.photographs.size
        shapes = ((size, side, side, 3), np.uint8), ((size,), np.int32), ((size,), np.int32), ((size,), bool)
        return tuple(put(np.zeros(shape, dtype), batch_sharding(self.mesh)) for shape, dtype in shapes)

    def _rows(self, size: int) -> slice:
        """Returns the rows of a physical batch on this process's devices, which must be neighbours."""
        places = batch_sharding(self.mesh).addressable_devices_indices_map((size,)).values()
        mine = sorted({place[0].indices(size)[:2] for place in places})
        if any(before[1] != after[0] for before, after in zip(mine, mine[1:], strict=False)):
            raise ValueError(
                f"the devices of a process must be neighbours in the mesh, got rows {mine}; pass `devices` in the "
                "order of jax.devices()"
            )
        return slice(mine[0][0], mine[-1][1])


def make_feed(data: Dataset, augmult: int, mesh: Mesh) -> Feed:
    """Returns the source of physical batches that suits the training images of a data set.

    Photographs are enlarged for random crops if `augmult`, the number of views, is not 0.
    """
    if not isinstance(data.train, Photographs):
        return InMemoryBatches(data.train, mesh)
    enlarged = data.train.resized(data.recipe.enlarged) if augmult else data.train
    return StreamedBatches(enlarged, mesh)
