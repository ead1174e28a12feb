"""Two processes on loopback make the update, and the whole run, that one device makes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import shared_runs
import tiny
from flax import nnx
from tiny_networks import small_nf_resnet

from dpnb import results, training
from dpnb.data import load
from dpnb.data.stand_ins import write_folders
from dpnb.training import make_trainer, one_update
from dpnb.training.devices import memory_of
from dpnb.training.update import draw_noise

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("checked_once")]
WORKER = """
import json, os, pathlib, sys
import jax
port, rank, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank, initialization_timeout=300)
import numpy as np
import shared_runs
import tiny
from dpnb import data, training
from dpnb.privacy.ledger import Ledger
from dpnb.training import hosts, session
from dpnb.training.update import make_trainer, one_update
hosts.PATIENCE = 0.5
session.check_trainer = shared_runs.check_once(session.check_trainer)
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
trained = np.asarray(run.ema_params["layer"]["kernel"], np.float64)
photographs = data.load("noise", data_dir=directory + "/data", image_size=8)  # each decodes its half
def stream(shard, **options):
    e = tiny.experiment(dataset="noise", shard=shard, image_size=8)
    where = f"{directory}/photographs-{shard}"
    return training.train(e, photographs, where, model=tiny.Linear(), **options)
stream(True, stop_at_step=2)  # to go on with a divided state
streamed = [stream(shard) for shard in (False, True)]
apart, refused = f"{directory}/of-{rank}", []
pathlib.Path(apart).mkdir()
def broken():
    raise OSError("no such disk")
for attempt in (lambda: training.train(tiny.experiment(augmult=0), tiny.data(), apart, model=tiny.Linear()),
                lambda: hosts.call_on_all(broken if rank else lambda: "read")):
    try:
        attempt()
    except Exception as error:  # of both
        refused.append(f"{type(error).__name__}: {error}")
real, failed = Ledger.charge, ""
def full(*_):
    raise OSError("disk full")
Ledger.charge = full  # of the first process: nobody waits for it
try:
    training.train(tiny.experiment(augmult=0), tiny.data(), directory + "/full", model=tiny.Linear())
except Exception as error:
    failed = type(error).__name__ + " " + str(error)
said = json.dumps({
    "streamed": [np.asarray(r.ema_params["layer"]["kernel"], np.float64).ravel().tolist() for r in streamed],
    "streamed_accuracy": streamed[0].ema.accuracy,
    "devices": len(jax.devices()), "kernel": kernel.ravel().tolist(),
    "examples": float(seen.examples.addressable_data(0)), "stopped": stopped.steps, "steps": run.steps,
    "trained": trained.ravel().tolist(), "accuracy": run.ema.accuracy,
    "history": [[point["step"], point["batch_size"]] for point in run.history], "events": run.events,
    "failed": failed, "refused": refused, "left": sorted(os.listdir(apart)),
})
open(f"{directory}/said-{rank}.json", "w").write(said)  # more than fits in a pipe
"""


def photographs(root):
    """Noise as JPEG files, from a folder of folders."""
    write_folders(tiny.data(), root / "noise", side=12)
    return load("noise", data_dir=root, image_size=8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of the run and the photographs, on a disk that both processes see."""
    root = tmp_path_factory.mktemp("run")
    photographs(root / "data")
    return root


@pytest.fixture
def two_processes(two_processes_once):
    return [dict(said) for said in two_processes_once]


@pytest.fixture(scope="module")
def two_processes_once(directory):
    environment = shared_runs.with_helpers(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2",
    )
    port = str(shared_runs.free_port())
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
    return [json.loads((directory / f"said-{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_make_the_update_of_one_device(two_processes):
    """Four devices in two processes; float32 rounding apart."""
    first, second = two_processes
    assert first["devices"] == 4
    assert first.pop("failed").startswith("OSError disk full") and "OSError: disk full" in second.pop(
        "failed"
    )
    said = [run.pop("refused") for run in (first, second)]
    assert all(of[0].startswith("ValueError: all processes must see one folder") for of in said)
    assert "of-0 was not seen by process 1;" in said[0][0] and said[0][0] == said[1][0]
    assert first["left"] == second["left"] == []
    assert said[0][1].startswith("AnotherProcessFailed: process 1 failed")
    assert said[1][1] == "OSError: no such disk"
    assert first == second  # both hold the same parameters, to the bit, and the same ledger
    assert sum(event["steps"] for event in first["events"]) == 6
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
    assert (first["stopped"], first["steps"]) == (second["stopped"], second["steps"]) == (4, 6)
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


def test_two_processes_train_on_photographs_as_one_device_does(two_processes, directory, tmp_path):
    """Copied or divided state; each process decodes the rows of its own devices."""
    first, second = two_processes
    assert first["streamed"] == second["streamed"]
    data = load("noise", data_dir=directory / "data", image_size=8)
    run = training.train(
        tiny.experiment(dataset="noise", image_size=8),
        data,
        tmp_path,
        model=tiny.Linear(),
        devices=jax.devices()[:1],
    )
    alone = np.asarray(run.ema_params["layer"]["kernel"], np.float64).ravel()
    for kernel in first["streamed"]:
        np.testing.assert_allclose(kernel, alone, rtol=0, atol=1e-5)
    assert first["streamed_accuracy"] == run.ema.accuracy


def updates(data, devices, steps=2, model=tiny.Linear, physical=4, **changes):
    e = tiny.experiment(momentum=0.9, **changes)
    trainer = make_trainer(
        e, data, seed=5, model=model(), devices=jax.devices()[:devices], physical_batch_size=physical
    )
    state, seen = trainer.state, None
    for _ in range(steps):
        state, seen = one_update(trainer, state)
    return trainer, state, seen


def assert_close(a, b):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-6), a, b
    )


def test_photographs_on_eight_devices_give_the_update_of_one(tmp_path):
    """An NF-ResNet on photographs from disk; each device gets the rows of its own; rounding apart."""
    data = photographs(tmp_path)
    (_, one, seen_one), (_, eight, seen_eight) = (
        updates(data, n, model=lambda: small_nf_resnet(nnx.Rngs(0)), physical=1, augmult=1) for n in (1, 8)
    )
    assert_close(one.params, eight.params)
    assert float(seen_one.examples) == float(seen_eight.examples) > 0


def test_divided_state_is_the_same_and_an_eighth_of_the_memory(tmp_path):
    """Parameters, averages, momentum and noise: the kernel's 192 rows lie on eight devices, 24 on each."""
    data = photographs(tmp_path)
    (_, copied, _), (trainer, divided, _) = updates(data, 8), updates(data, 8, shard=True)
    assert_close(copied, divided)
    for tree in (divided.params, divided.ema, divided.optimizer[0].trace):
        assert tree["layer"]["kernel"].addressable_data(0).shape == (24, 4)
    assert divided.params["layer"]["bias"].is_fully_replicated  # 4 numbers, 8 devices
    noise = trainer.update.lower(divided, trainer.zero(), draw_noise(trainer, 0)).compile().memory_analysis()
    replicated = updates(data, 8, steps=0)[0]
    lowered = replicated.update.lower(copied, replicated.zero(), draw_noise(replicated, 0))
    whole = lowered.compile().memory_analysis()
    assert noise.output_size_in_bytes < 0.3 * whole.output_size_in_bytes


@pytest.mark.parametrize("shard", [False, True])
def test_memory_per_device_does_not_grow_with_their_number(tmp_path, shard):
    """Of one physical batch and of one update, at four photographs a device."""
    data = photographs(tmp_path)

    def memory(devices):
        trainer, state, _ = updates(data, devices, steps=0, shard=shard)
        totals = trainer.zero()
        batch = trainer.feed.blank(trainer.physical_batch_size)
        compiled = (
            trainer.accumulate.lower(state.params, totals, *batch, jax.random.key(0)).compile(),
            trainer.update.lower(state, totals, draw_noise(trainer, 0)).compile(),
        )
        return [memory_of(c) for c in compiled]

    few, many = memory(2), memory(8)
    assert all(b <= 1.02 * a + 4096 for a, b in zip(few, many, strict=True)), (few, many)


def test_a_run_with_a_divided_state_resumes_and_is_saved(tmp_path):
    data = photographs(tmp_path)

    def train(directory, **options):
        e = tiny.experiment(dataset="noise", steps=4, shard=True, image_size=8)
        return training.train(e, data, tmp_path / directory, model=tiny.Linear(), **options)

    run = train("a")
    train("b", stop_at_step=2)
    again = train("b")
    jax.tree.map(np.testing.assert_array_equal, run.ema_params, again.ema_params)
    assert results.save(run, data, tmp_path / "a")["accuracy"]["ema"] == run.ema.accuracy
