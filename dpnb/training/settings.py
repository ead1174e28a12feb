"""Collects what is known to decide how a program rounds, and the hardware it runs on."""

import hashlib
import json
import os
import pathlib
import platform

import flax
import jax
import jaxlib
import numpy as np
import optax

from dpnb.data import Dataset, Photographs
from dpnb.experiments import Experiment
from dpnb.models.precision import resolve
from dpnb.training.devices import memory_limit, per_device_batch_size
from dpnb.training.identity import code

DECISIVE_FLAGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_softmax_custom_jvp", "jax_disable_jit",
)  # fmt: skip


def hardware(devices: list[jax.Device]) -> str:
    """Returns number and kind of the devices, and the version of JAX, in words."""
    return f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"


def settings_of(experiment: Experiment, data: Dataset, devices: list[jax.Device]) -> str:
    """Returns the SHA-256 (hex) of what is known to decide how a program rounds; a change redraws noise.

    Like any such list it is incomplete, and it only avoids surprises: whether a repeated update is the same
    is decided by its bits (`dpnb.training.replay`).
    """
    found = {name: getattr(experiment, name) for name in ("form", "formulation", "remat", "shard")}
    found |= {
        "call": per_device_batch_size(experiment),
        "compute_dtype": resolve(experiment.compute_dtype, devices[0]),
        "memory": memory_limit(devices),
        "processes": jax.process_count(),
    }
    found |= {"hardware": hardware(devices), "code": code(), **versions(data)}
    found |= flags()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def flags() -> dict[str, str]:
    """Returns the settings of JAX that decide how a program rounds."""
    return {name: str(getattr(jax.config, name, None)) for name in DECISIVE_FLAGS}


def rounding(data: Dataset) -> dict[str, str]:
    """Returns what is known to decide the last bits of a program that reads `data` here, for keys."""
    cpu = f"{platform.machine()} {_cpu()}, {os.cpu_count()} cores"
    return {"hardware": hardware(jax.devices()), "cpu": cpu, **flags(), **versions(data)}


def _cpu() -> str:
    """Returns model and instructions of the processor, as Linux says, else its name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    said = {name.strip(): text for name, _, text in (line.partition(":") for line in lines)}
    return said.get("model name", "") + said.get("flags", said.get("Features", ""))


def versions(data: Dataset) -> dict[str, str]:
    """Returns versions and flags of compiler, libraries and image decoders, which affect the last bits."""
    found = {"jaxlib": jaxlib.__version__, "flax": flax.__version__, "optax": optax.__version__}
    found |= {"numpy": np.__version__, "flags": os.environ.get("XLA_FLAGS", "")}
    if isinstance(data.train, Photographs):
        from PIL import __version__
        from PIL import features as codecs

        found |= {"pillow": __version__, "jpeg": str(codecs.version("jpg"))}
    return found
