"""A run that is killed anywhere ends like one that was not, and has spent no more."""

import json
import shutil
import signal
import stat
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import shared_runs
import tiny
from flax import nnx

from dpnb import training
from dpnb.privacy import Ledger, LedgerError, PrivacyBudget
from dpnb.training import checkpoints, loop, replay, seeds
from dpnb.training.identity import computation

pytestmark = pytest.mark.usefixtures("checked_once")


def train(directory, **options):
    options = {"checkpoint_every": 0.0, "devices": jax.devices()[:1], "model": tiny.Linear(), **options}
    experiment = options.pop("experiment", None) or tiny.experiment(augmult=0, eval_every=2)
    return training.train(experiment, options.pop("data", None) or tiny.data(), directory, **options)


def arrays(run) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves((run.params, run.ema_params))]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


@pytest.fixture(scope="module")
def whole_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(whole_directory):
    """The run that nothing interrupts."""
    return train(whole_directory)


@pytest.fixture(scope="module")
def stopped_directory(tmp_path_factory):
    """A run stopped after four of its six steps; copy it before going on."""
    directory = tmp_path_factory.mktemp("stopped")
    train(directory, stop_at_step=4)
    return directory


@pytest.fixture
def stopped(stopped_directory, tmp_path):
    return shutil.copytree(stopped_directory, tmp_path / "copy")


def assert_identical(run, whole):
    assert same(run, whole)
    assert run.events == whole.events and run.steps == whole.steps == 6
    assert [p["step"] for p in run.history] == [2, 4, 6]
    assert run.history == whole.history
    assert not run.stopped


KILLED = """
import os, signal, sys
import jax
import tiny
from dpnb import training
from dpnb.training import checkpoints, replay
from dpnb.privacy import ledger

directory, where = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def before(owner, name, when):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        if when(*args, **kwargs):
            die()
        return original(*args, **kwargs)
    setattr(owner, name, patched)

if where == "update":  # paid, not made
    before(replay, "one_update", lambda trainer, state: int(state.step) == 2)
elif where == "writing a checkpoint":  # in the middle: its folder is renamed when it is whole
    import pathlib
    for name in ("rename", "replace"):
        before(os, name, lambda a, *_, **__: "checkpoints/3" in str(a))
        before(pathlib.Path, name, lambda a, *_, **__: "checkpoints/3" in str(a))
elif where == "writing the ledger":  # half a line reaches the disk
    original = os.write
    def torn(file, data):
        if b'"step": 4' in data:
            original(file, data[: len(data) // 2])
            die()
        return original(file, data)
    os.write = torn
training.train(
    tiny.experiment(augmult=0, eval_every=2), tiny.data(), directory, model=tiny.Linear(), checkpoint_every=0.0,
    devices=jax.devices()[:1],
)
"""


@pytest.mark.slow
def test_killed_by_the_system_at_three_places(tmp_path, whole):
    """SIGKILL: nothing is cleaned up. Every life begins in a new process."""
    environment = shared_runs.with_helpers()
    for where in ("update", "writing a checkpoint", "writing the ledger"):
        command = [sys.executable, "-c", KILLED, str(tmp_path), where]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == -signal.SIGKILL, (where, done.stderr[-2000:])
    assert_identical(train(tmp_path), whole)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()[1:]]
    assert [line["step"] for line in lines] == list(range(6))  # replays were free, nothing is missing


class Interrupt(BaseException):
    """Like KeyboardInterrupt: passes `except Exception`."""


@pytest.mark.slow
def test_interrupted_in_every_part_of_the_loop(tmp_path, whole, monkeypatch):
    def interrupt(owner, name, call, after=False):
        original, calls = getattr(owner, name), []

        def patched(*args, **kwargs):
            calls.append(1)
            if len(calls) == call and not after:
                raise Interrupt(name)
            result = original(*args, **kwargs)
            if len(calls) == call:
                raise Interrupt(name)
            return result

        with monkeypatch.context() as patch, pytest.raises(Interrupt):
            patch.setattr(owner, name, patched)
            train(tmp_path)

    interrupt(replay, "one_update", 1, after=True)  # made, its result lost
    interrupt(Ledger, "charge", 2)
    interrupt(Ledger, "charge", 1, after=True)  # paid, not made
    interrupt(checkpoints.ocp.CheckpointManager, "save", 1)
    interrupt(checkpoints.ocp.CheckpointManager, "save", 1, after=True)
    interrupt(loop, "curve_point", 1)
    assert_identical(train(tmp_path), whole)


def test_checkpoints_can_be_deleted_but_nothing_is_free_twice(stopped, whole):
    """Without checkpoints everything is replayed, to the bit, so that the ledger stands still."""
    shutil.rmtree(stopped / "checkpoints")
    assert_identical(train(stopped), whole)


def test_a_finished_run_costs_nothing_more(whole_directory, whole, tmp_path):
    assert_identical(train(shutil.copytree(whole_directory, tmp_path / "copy")), whole)


def test_a_deleted_ledger_is_noticed(stopped):
    (stopped / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="deleted"):
        train(stopped)


def test_a_replay_on_other_devices_is_paid_for(stopped):
    """Other hardware rounds otherwise: steps after the last checkpoint are released a second time."""
    shutil.rmtree(stopped / "checkpoints")
    run = train(stopped, devices=jax.devices()[:2])
    assert run.steps == 2 and "would exceed" in run.stopped
    assert run.events[0]["steps"] == 6
    budget = PrivacyBudget(run.experiment.epsilon, run.experiment.delta)
    with Ledger(stopped / "ledger.jsonl", budget, "rdp") as ledger:
        assert ledger.steps == 6 and ledger.spent <= budget.epsilon


def test_a_checkpoint_can_go_on_on_other_devices(stopped, whole):
    """Nothing is replayed then, and the noise is fresh: a repeated step would be another release."""
    run = train(stopped, devices=jax.devices()[:2])
    assert run.events == whole.events and run.steps == 6 and not run.stopped
    for a, b in zip(arrays(run), arrays(whole), strict=True):
        assert np.isfinite(a).all() and not np.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_can_go_on_in_other_physical_batches(stopped, whole):
    """As on a device with less free memory: accepted, and noised afresh, for it rounds otherwise."""
    run = train(stopped, experiment=tiny.experiment(augmult=0, eval_every=2, physical_batch_size=8))
    assert run.events == whole.events and run.steps == 6 and not run.stopped
    for a, b in zip(arrays(run), arrays(whole), strict=True):
        assert np.isfinite(a).all() and not np.allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_another_run_in_the_same_directory_is_refused(tmp_path):
    base = dict(augmult=0, steps=3, epsilon=5.0, noise_multiplier=2.0)
    train(tmp_path, experiment=tiny.experiment(**base), stop_at_step=1)
    ledger = (tmp_path / "ledger.jsonl").read_text()
    others = [
        dict(experiment=tiny.experiment(**base, learning_rate=0.1)),
        dict(experiment=tiny.experiment(**base, seed=1)),
        dict(experiment=tiny.experiment(**base), data=tiny.data(seed=1)),
        dict(experiment=tiny.experiment(**base), model=tiny.Linear(1)),  # other initial parameters
        dict(experiment=tiny.experiment(**base), optimizer=optax.sgd(0.1)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="another"):
            train(tmp_path, **other)
    assert (tmp_path / "ledger.jsonl").read_text() == ledger


@pytest.mark.slow
def test_a_secret_seed_stays_secret(tmp_path):
    """In a file of mode 0600 and nowhere else, neither as a number nor as the key made from it."""
    experiment = tiny.experiment(augmult=0, seed=None, steps=3)
    first = train(tmp_path, experiment=experiment, stop_at_step=2)
    file = tmp_path / "private" / "seed.secret"
    assert [stat.S_IMODE(f.stat().st_mode) for f in (file, file.parent)] == [0o600, 0o700]
    assert [f.name for f in tmp_path.iterdir()] == ["private"]
    secret = json.loads(file.read_text())["seed"]
    assert str(secret) not in repr(first.experiment) and first.experiment.seed is None
    for other in tmp_path.rglob("*"):
        if other.is_file() and other != file:
            assert str(secret).encode() not in other.read_bytes(), other
    # the checkpoint does not hold the key either
    manager = checkpoints.ocp.CheckpointManager((file.parent / "checkpoints").absolute())
    state = manager.restore(
        2, args=checkpoints.ocp.args.Composite(state=checkpoints.ocp.args.StandardRestore())
    ).state
    manager.close()
    assert (np.asarray(state["key"] if isinstance(state, dict) else state.key) == 0).all()
    assert train(tmp_path, experiment=experiment).events[0]["steps"] == 3


@pytest.mark.slow
def test_a_lost_secret_is_not_a_free_replay(tmp_path):
    """The new secret draws other noise: every step is a new release and is charged."""
    experiment = tiny.experiment(augmult=0, seed=None, steps=3)
    train(tmp_path, experiment=experiment, stop_at_step=2)
    (tmp_path / "private" / "seed.secret").unlink()
    shutil.rmtree(tmp_path / "private" / "checkpoints")
    again = train(tmp_path, experiment=experiment)
    assert again.steps == 1 and again.stopped  # two were spent, one was left


def test_two_secret_seeds_differ(tmp_path):
    assert seeds.run_seed(tmp_path, 5)[0] == 5
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (seeds.run_seed(tmp_path / d, None) for d in "ab")
    assert a[0] != b[0] and a[1] != b[1]
    assert seeds.run_seed(tmp_path / "a", None) == a


def test_identity_of_a_model_is_what_it_computes():
    """Parameters, architecture and learning rate count; memory addresses do not."""

    class Scaled(nnx.Module):
        def __init__(self, scale):
            self.layer, self.scale = tiny.Linear(), scale

        def __call__(self, x):
            return self.scale * self.layer(x)

    shape = (8, 8, 3)
    assert computation(tiny.Linear(), optax.sgd(0.1), shape) == computation(
        tiny.Linear(), optax.sgd(0.1), shape
    )
    models = [tiny.Linear(), tiny.Linear(1), Scaled(2.0), Scaled(3.0), None]
    optimizers = [None, optax.sgd(0.1), optax.sgd(0.2), optax.adam(0.1)]
    every = {computation(m, o, shape) for m in models for o in optimizers}
    assert len(every) == len(models) * len(optimizers)
