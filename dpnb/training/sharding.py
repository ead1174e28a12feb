"""Where arrays lie on a one-dimensional mesh: whole on every device, or divided over them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Divided along the first axis."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def state_shardings(tree: Any, mesh: Mesh, divided: bool) -> Any:
    """A sharding for each leaf: whole, or (`divided`) along its longest axis that the devices divide.

    Leaves without such an axis stay whole.
    """

    def place(leaf):
        axes = [a for a, n in enumerate(leaf.shape) if n and n % mesh.devices.size == 0] if divided else []
        if not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(place, tree)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all of them."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def fetch_replicated(x: jax.Array) -> jax.Array:
    """The whole array on a device of this process; every process has to call it for one that is divided."""
    if not x.is_fully_replicated:
        x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return x.addressable_data(0)
