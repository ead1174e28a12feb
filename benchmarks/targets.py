"""Devices that programs can be compiled for without one: JAX's own descriptions, and how much memory they have.

GPUs are described from OpenXLA's specifications and NVIDIA's data sheets. What is compiled has the layouts and kernels of
the device, but convolutions are not tuned, which needs one.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable

import numpy as np


def enable(folder: str | pathlib.Path) -> None:
    """Makes the compilers in a folder known to JAX, which must not have been used yet.

    Args:
      folder: where `make compiled` installed `requirements()`.
    """
    folder = pathlib.Path(folder).resolve()
    sys.path.insert(0, str(folder))
    nvcc = folder / "nvidia" / "cuda_nvcc"
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3", "PATH": f"{nvcc / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    flags = f"--xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def requirements() -> list[str]:
    """Returns the wheels that compile for TPUs and GPUs, in the versions that the installed JAX asks for."""
    import importlib.metadata

    asked = importlib.metadata.requires("jax") or []
    tpu = next(r.partition(";")[0].strip() for r in asked if r.startswith("libtpu"))
    version = importlib.metadata.version("jax")
    cuda = ("nvcc", "runtime", "cupti")
    libraries = ("cudnn", "cublas", "cusparse", "cusolver", "cufft", "nvjitlink")
    return [
        tpu, f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}", *(f"nvidia-cuda-{c}-cu12" for c in cuda),
        *(f"nvidia-{name}-cu12" for name in libraries),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, or several.

    memory: bytes of one device.
    describe: makes JAX's description.
    """

    name: str
    memory: int
    describe: Callable

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith("TPU")

    def mesh(self):
        """Returns the mesh of the target's devices."""
        import jax

        from dpnb.training.sharding import AXIS

        return jax.sharding.Mesh(np.array(self.describe().devices), (AXIS,))


def _tpu(name: str, chips: str) -> Target:
    def describe():
        from jax.experimental import topologies

        bounds = tuple(int(n) for n in f"{chips}x1".split("x"))
        return topologies.get_topology_desc(f"v5e:{chips}", "tpu", chips_per_host_bounds=bounds)

    return Target(name, 16 * 10**9, describe)


def _gpu(name: str, memory: int, capability: tuple[int, int], **numbers) -> Target:
    text = f"""
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_memory_size: {memory}
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          cuda_compute_capability {{
            major: {capability[0]} minor: {capability[1]}
            feature_extension: {"ACCELERATED_FEATURES" if capability[0] >= 9 else "NONE"}
          }}
          device_vendor: "NVIDIA Corporation" runtime_version: "12.8.0" driver_version: "12.8.0"
          compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0" device_address_bits: 64 name: "{name}"
          {" ".join(f"{key}: {value}" for key, value in numbers.items())}
        }}"""

    def describe():
        from jax.experimental import topologies

        return topologies.get_topology_desc("1x1x1", "cuda", topology="1x1x1", target_config=text)

    return Target(name, memory, describe)


TARGETS = {
    "v5e": _tpu("TPU v5e", "1x1"),
    "v5e-8": _tpu("TPU v5e-8", "2x4"),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", 84_942_979_072, (9, 0), core_count=132, fpus_per_core=128, clock_rate_ghz=1.98,
        memory_bandwidth=3_352_320_000_000, l2_cache_size=52_428_800, threads_per_core_limit=2048,
        shared_memory_per_core=233_472, shared_memory_per_block_optin=232_448,
    ),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", 85_100_068_864, (8, 0), core_count=108, fpus_per_core=64, clock_rate_ghz=1.41,
        memory_bandwidth=2_039_040_000_000, l2_cache_size=41_943_040, threads_per_core_limit=2048,
        shared_memory_per_core=167_936, shared_memory_per_block_optin=166_912,
    ),
    "t4": _gpu(
        "Tesla T4", 15_828_320_256, (7, 5), core_count=40, fpus_per_core=64, clock_rate_ghz=1.59,
        memory_bandwidth=320_064_000_000, l2_cache_size=4_194_304, threads_per_core_limit=1024,
        shared_memory_per_core=65_536, shared_memory_per_block_optin=65_536,
    ),
}  # fmt: skip
