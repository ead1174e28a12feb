"""Physical batches on the devices: of images that all lie there, or of photographs that are read ahead."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dpnb.data import Dataset
from dpnb.data.photographs import Photographs
from dpnb.data.sources import name_unreadable
from dpnb.privacy import sampling
from dpnb.training.sharding import batch_sharding, put, replicated


class Feed(Protocol):
    """Where the training images are, and how they come to the devices.

    A trainer owns one feed and one sampler. The feed borrows the sampler for a call of `batches`: reading ahead has
    to know which examples the next updates will draw.
    """

    resident: bool  # whether the whole data set lies on every device, and a batch is indices into it

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """(images, labels, indices, mask) of every physical batch of update `step`, for `Trainer.accumulate`.

        Args:
          sampler: which examples are in which update.
          size: examples in a physical batch, over all devices.
        """

    def blank(self, size: int) -> tuple:
        """A physical batch of padding alone."""


class InMemoryBatches:
    """The whole data set on every device; a batch is indices into it.

    images: uint8 [n, h, w, c] (or float32 features); labels: int32 [n].
    """

    resident = True

    def __init__(self, split, mesh: Mesh):
        self.mesh = mesh
        self.images, self.labels = (put(x, replicated(mesh)) for x in (split.images, split.labels))

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """(images, labels, indices, mask) of every physical batch of update `step`, for `accumulate`."""
        for indices, mask in sampling.physical_batches(sampler.indices(step), size):
            yield self.batch(indices, mask)

    def batch(self, indices: np.ndarray, mask: np.ndarray) -> tuple:
        """These examples, divided over the devices."""
        return self.images, self.labels, *(put(x, batch_sharding(self.mesh)) for x in (indices, mask))

    def blank(self, size: int) -> tuple:
        """A physical batch of padding alone."""
        return self.batch(np.zeros(size, np.int32), np.zeros(size, bool))


@dataclasses.dataclass
class StreamedBatches:
    """Photographs from disk, read ahead of the device; each process reads the rows of its own devices."""

    photographs: Photographs
    mesh: Mesh

    resident = False

    def __post_init__(self):
        self.prefetched, self.next_call, self.lookahead, self.named = None, None, None, set()

    def batches(self, sampler: sampling.Sampler, step: int, size: int) -> Iterator[tuple]:
        """(images, labels, indices, mask) of every physical batch of update `step`, for `accumulate`.

        Images that cannot be read are named in a warning, once, and come with the label -1.
        """
        if self.next_call != (step, size, sampler):  # the first call, or not where the last one ended
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
        """A physical batch of padding alone."""
        side = self.photographs.size
        shapes = ((size, side, side, 3), np.uint8), ((size,), np.int32), ((size,), np.int32), ((size,), bool)
        return tuple(put(np.zeros(shape, dtype), batch_sharding(self.mesh)) for shape, dtype in shapes)

    def _rows(self, size: int) -> slice:
        """The rows of a physical batch that lie on this process's devices, which are neighbours."""
        places = batch_sharding(self.mesh).addressable_devices_indices_map((size,)).values()
        mine = sorted({place[0].indices(size)[:2] for place in places})
        if any(before[1] != after[0] for before, after in zip(mine, mine[1:], strict=False)):
            raise ValueError(
                f"the devices of a process must be neighbours in the mesh, got rows {mine}; pass `devices` in the "
                "order of jax.devices()"
            )
        return slice(mine[0][0], mine[-1][1])


def make_feed(data: Dataset, augmult: int, mesh: Mesh) -> Feed:
    """The training images of a data set, in the way that suits them."""
    if not isinstance(data.train, Photographs):
        return InMemoryBatches(data.train, mesh)
    enlarged = data.train.resized(data.recipe.enlarged) if augmult else data.train
    return StreamedBatches(enlarged, mesh)
