"""The memory of devices, and how many examples go into one call."""

import jax

from dpnb.experiments import Experiment
from dpnb.training.hosts import broadcast_from_process_0


def memory_limit(devices: list[jax.Device]) -> int:
    """Returns the bytes a device has for arrays, 8 GiB if the backend does not report it, as on process 0."""
    mine = next((d for d in devices if d.process_index == jax.process_index()), jax.local_devices()[0])
    return broadcast_from_process_0(device_memory(mine))


def device_memory(device: jax.Device) -> int:
    """Returns the bytes a device of this process has for arrays, 8 GiB if the backend does not report it."""
    return (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)


def free_memory(device: jax.Device) -> int:
    """Returns the free bytes on the device, of 8 GiB if the backend does not report its memory."""
    return device_memory(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)


def memory_of(compiled) -> int:
    """Returns the bytes that one call of a compiled program holds on one device: arguments, results, temporaries."""
    m = compiled.memory_analysis()
    parts = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return parts - m.alias_size_in_bytes


def examples_per_microbatch(augmult: int) -> int:
    """Returns the examples per microbatch: about eight views, the fastest on CPU in benchmarks/."""
    return max(1, 8 // max(augmult, 1))


def per_device_batch_size(experiment: Experiment) -> int:
    """Returns the examples per device and call: the experiment's choice, else 32 views or two examples."""
    return experiment.physical_batch_size or max(2, 32 // max(experiment.augmult, 1))
