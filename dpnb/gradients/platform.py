"""The device for which a program is traced."""

from typing import Any

import jax

BEFORE_AMPERE = (
    "T4", "V100", "P100", "P40", "P4", "K80", "TITAN", "Quadro", "GTX", "RTX 2060", "RTX 2070", "RTX 2080",
)  # fmt: skip


def device() -> Any:
    """Returns a device for which something is traced now, or its description: `platform` and `device_kind`.

    Inside `jax.shard_map`, and inside `jax.sharding.use_abstract_mesh`, it is one of its mesh, which need not be
    there: a program can be compiled for a device that is only described. Elsewhere it is the device on which JAX puts
    arrays by default.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    if found is None:
        default: Any = getattr(jax.config, "jax_default_device", None)
        found = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return found


def platform() -> str:
    """Returns the platform of `device()`: "cpu", "gpu", "tpu" ..."""
    return str(device().platform)


def computes_bfloat16(device: Any) -> bool:
    """Returns whether a device has units for bfloat16: TPUs, and GPUs from Ampere (compute capability 8.0) on."""
    if device.platform != "gpu":
        return bool(device.platform == "tpu")
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    if major.isdigit():
        return int(major) >= 8
    return not any(name in device.device_kind for name in BEFORE_AMPERE)
