"""Places arrays on a one-dimensional mesh: whole on every device, or divided over the devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_shardings(tree: Any, mesh: Mesh, divided: bool) -> Any:
    """Returns a sharding for each leaf: whole, or (`divided`) along its longest divisible axis.

    An axis is divisible if its length is a multiple of the number of devices; leaves without one stay whole.
    """

    def place(leaf):
        axes = [a for a, n in enumerate(leaf.shape) if n and n % mesh.devices.size == 0] if divided else []
        if not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(place, tree)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process has on the devices of all processes."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def fetch_replicated(x: jax.Array) -> jax.Array:
    """Returns the whole array on a device of this process; if it is divided, every process must call this."""
    if not x.is_fully_replicated:
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return x.addressable_data(0)
