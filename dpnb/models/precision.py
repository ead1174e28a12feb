"""The dtype in which a network computes: half precision where a device has units for it."""

import jax

from dpnb.gradients.platform import computes_bfloat16
from dpnb.gradients.platform import device as default_device


def resolve(compute_dtype: str, device: jax.Device | None = None) -> str:
    """Returns the dtype that an experiment's `compute_dtype` means on a device.

    "auto" is "bfloat16" on TPUs and on NVIDIA GPUs from Ampere on (compute capability 8.0), "float16" on older ones
    (T4, V100), which compute bfloat16 in float32, and "float32" on CPUs. Other names mean themselves.

    Args:
      device: of the computation (default: that on which JAX puts arrays by default). It need not be there.
    """
    if compute_dtype != "auto":
        return compute_dtype
    device = device or default_device()
    if computes_bfloat16(device):
        return "bfloat16"
    return "float16" if device.platform == "gpu" else "float32"


def resolved(experiment, device: jax.Device | None = None):
    """Returns the experiment with the dtype in which it computes on a device in place of "auto"."""
    return experiment.replace(compute_dtype=resolve(experiment.compute_dtype, device))


def dtype_of(experiment) -> str | None:
    """Returns the `dtype` with which an experiment's network is built: None for float32, that of the inputs."""
    name = resolve(experiment.compute_dtype)
    return None if name == "float32" else name
