"""Two processes on loopback make the update that one device makes."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from dpnb.update import make_trainer, one_update

WORKER = """
import json, sys
import jax
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=300)
import numpy as np
import tiny
from dpnb.update import make_trainer, one_update
trainer = make_trainer(tiny.experiment(augmult=1), tiny.data(), seed=5, model=tiny.Linear(), physical_batch_size=4)
state = trainer.state
for _ in range(2):
    state, seen = one_update(trainer, state)
kernel = np.asarray(state.params["layer"]["kernel"].addressable_data(0), np.float64)
print(json.dumps([len(jax.devices()), kernel.ravel().tolist(), float(seen.examples.addressable_data(0))]))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes():
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }  # fmt: skip
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(rank)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=400) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, errors) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, errors[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]


def test_two_processes_make_the_update_of_one_device(two_processes):
    """Four devices in two processes; float32 rounding apart."""
    (devices, first, examples), (_, second, _) = two_processes
    assert devices == 4
    assert first == second  # both hold the same parameters, to the bit
    trainer = make_trainer(
        tiny.experiment(augmult=1), tiny.data(), seed=5, model=tiny.Linear(), devices=jax.devices()[:1],
        physical_batch_size=4,
    )  # fmt: skip
    state = trainer.state
    for _ in range(2):
        state, seen = one_update(trainer, state)
    alone = np.asarray(state.params["layer"]["kernel"], np.float64).ravel()
    np.testing.assert_allclose(first, alone, rtol=0, atol=1e-6)
    assert examples == float(seen.examples)
    start = np.asarray(trainer.state.params["layer"]["kernel"]).ravel()
    assert np.abs(alone - start).max() > 0.01
