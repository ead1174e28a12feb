"""The platform for which a program is traced."""

import jax


def platform() -> str:
    """Returns the platform of the devices for which something is traced now: "cpu", "gpu", "tpu" ...

    Inside `jax.shard_map`, and inside `jax.sharding.use_abstract_mesh`, these are the devices of its mesh, which
    need not be there: a program can be compiled for a device that is only described. Elsewhere it is the device
    on which JAX puts arrays by default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.config.jax_default_device
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return device.platform
