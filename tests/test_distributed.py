"""Two processes on loopback make the update, and the whole run, that one device makes."""

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

from dpnb import training
from dpnb.update import make_trainer, one_update

WORKER = """
import json, sys
import jax
port, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=300)
import numpy as np
import tiny
from dpnb import training
from dpnb.update import make_trainer, one_update
trainer = make_trainer(tiny.experiment(augmult=1), tiny.data(), seed=5, model=tiny.Linear(), physical_batch_size=4)
state = trainer.state
for _ in range(2):
    state, seen = one_update(trainer, state)
kernel = np.asarray(state.params["layer"]["kernel"].addressable_data(0), np.float64)
def train(**options):
    return training.train(
        tiny.experiment(augmult=0), tiny.data(), directory, model=tiny.Linear(), checkpoint_every=0.0, **options
    )
stopped = train(stop_at_step=4)  # with a checkpoint that both processes write
run = train()
trained = np.asarray(run.ema_params["layer"]["kernel"].addressable_data(0), np.float64)
print(json.dumps({
    "devices": len(jax.devices()), "kernel": kernel.ravel().tolist(),
    "examples": float(seen.examples.addressable_data(0)), "stopped": stopped.steps, "steps": run.steps,
    "trained": trained.ravel().tolist(), "accuracy": run.ema.accuracy,
    "history": [[point["step"], point["batch_size"]] for point in run.history],
}))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of the run, on a disk that both processes see."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def two_processes(directory):
    here = pathlib.Path(__file__).parent
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }  # fmt: skip
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, port, str(rank), str(directory)], env=environment, text=True,
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
    first, second = two_processes
    assert first["devices"] == 4
    assert first == second  # both hold the same parameters, to the bit
    trainer = make_trainer(
        tiny.experiment(augmult=1), tiny.data(), seed=5, model=tiny.Linear(), devices=jax.devices()[:1],
        physical_batch_size=4,
    )  # fmt: skip
    state = trainer.state
    for _ in range(2):
        state, seen = one_update(trainer, state)
    alone = np.asarray(state.params["layer"]["kernel"], np.float64).ravel()
    np.testing.assert_allclose(first["kernel"], alone, rtol=0, atol=1e-6)
    assert first["examples"] == float(seen.examples)
    start = np.asarray(trainer.state.params["layer"]["kernel"]).ravel()
    assert np.abs(alone - start).max() > 0.01


def test_two_processes_make_the_run_of_one_device(two_processes, directory, tmp_path):
    """Stopped, continued from the checkpoint of both, evaluated; one ledger, written by the first."""
    first, second = two_processes
    assert first == second and (first["stopped"], first["steps"]) == (4, 6)
    run = training.train(
        tiny.experiment(augmult=0), tiny.data(), tmp_path, model=tiny.Linear(), devices=jax.devices()[:1]
    )
    alone = np.asarray(run.ema_params["layer"]["kernel"], np.float64).ravel()
    np.testing.assert_allclose(first["trained"], alone, rtol=0, atol=1e-5)
    assert first["history"] == [[point["step"], point["batch_size"]] for point in run.history]
    lines = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == list(range(6))
    start = np.asarray(tiny.Linear().layer.kernel[...]).ravel()
    assert np.abs(alone - start).max() > 0.01
