"""What devices have room for: their memory, and how many examples go into one call."""

import jax

from dpnb.experiments.experiment import Experiment
from dpnb.training.hosts import broadcast_from_process_0


def memory_limit(devices: list[jax.Device]) -> int:
    """Bytes that a device has for arrays, 8 GiB where it does not say; the first process's word holds for all."""
    mine = next((d for d in devices if d.process_index == jax.process_index()), jax.local_devices()[0])
    return broadcast_from_process_0(device_memory(mine))


def device_memory(device: jax.Device) -> int:
    """Bytes that a device of this process has for arrays, 8 GiB where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)


def examples_per_microbatch(augmult: int) -> int:
    """Examples per microbatch: about eight views, the fastest on CPU in benchmarks/."""
    return max(1, 8 // max(augmult, 1))


def per_device_batch_size(experiment: Experiment) -> int:
    """Examples per device and call: the experiment's choice, else 32 views in microbatches."""
    return experiment.physical_batch_size or max(2, 32 // max(experiment.augmult, 1))
