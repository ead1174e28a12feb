"""The state that an update reads and writes, and the sums over one logical batch."""

from typing import Any, NamedTuple

import jax

PyTree = Any


class State(NamedTuple):
    """All that an update reads and writes; a checkpoint holds all of it but the key."""

    step: jax.Array  # int32 [], updates done
    params: PyTree  # float32
    ema: PyTree  # float32, like params
    optimizer: PyTree
    key: jax.Array  # uint32 [2], the root of augmentation; never used directly


class Accumulator(NamedTuple):
    """Sums over a logical batch, one partial sum per device: leading axis [devices]."""

    gradient: PyTree  # clipped, int32 in units of the grid; float32 if there is no noise
    seen: "BatchMetrics"


class BatchMetrics(NamedTuple):
    """Sums over a logical batch that are NOT private: shown, but left out by `dpnb.results.release`.

    All are float32: examples, loss, fraction of views classified correctly, gradient norm before
    clipping (finite ones), examples that were clipped, examples with a non-finite gradient, and
    examples whose image could not be read.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    norm: jax.Array
    clipped: jax.Array
    nonfinite: jax.Array
    unreadable: jax.Array
