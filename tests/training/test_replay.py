"""A repeated update is free only if it is the same to the bit: whatever changes, released values never exceed charges.

`Witness` counts for itself what leaves `Payer.update`; histories are random with fixed seeds.
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import shared_runs
import tiny

from dpnb import privacy, training
from dpnb.privacy import Ledger, LedgerLocked
from dpnb.privacy.noise import GridNoise
from dpnb.training import loop, replay, seeds, session, settings, update
from dpnb.training.replay import Payer, digest

pytestmark = pytest.mark.usefixtures("checked_once")
E = tiny.experiment(augmult=1, eval_every=3)
STEPS = E.steps


class Interrupt(BaseException):
    """Like KeyboardInterrupt: passes `except Exception`."""


class Witness:
    """Keeps every value that was released, and the noise that went into it."""

    def __init__(self, monkeypatch):
        self.released, self.noise, self.drawn, self.ledgers = set(), {}, None, set()
        update, draw = Payer.update, GridNoise.__call__

        def watched(payer, state):
            new, seen, refusal = update(payer, state)
            if not refusal:
                value = int(state.step), digest(new)
                assert value[1] in payer.ledger.path.read_text()  # on disk before anybody sees it
                self.ledgers |= {*payer.ledger.path.read_text().splitlines()[1:]}
                self.released.add(value)
                # The same noise under two values would leave their bare difference.
                assert self.noise.setdefault(self.drawn, value) == value
            return new, seen, refusal

        def remembered(noise, step):
            self.drawn = noise.seed, step
            return draw(noise, step)

        monkeypatch.setattr(Payer, "update", watched)
        monkeypatch.setattr(GridNoise, "__call__", remembered)

    def check(self):
        charged = {(line["step"], line["released"]) for line in map(json.loads, self.ledgers)}
        assert self.released <= charged
        return len(self.released)


@pytest.fixture
def witness(monkeypatch):
    return Witness(monkeypatch)


def train(directory, **options):
    options = {"checkpoint_every": 0.0, "devices": jax.devices()[:1], "model": tiny.Linear(), **options}
    experiment = options.pop("experiment", E)
    return training.train(experiment, tiny.data(), directory, **options)


@pytest.fixture
def registered(monkeypatch):
    """A network of the zoo: a model of one's own is traced, so that its settings are in its name."""
    for module in (session, update):
        monkeypatch.setattr(module, "make_model", lambda *_: tiny.Linear())


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()[1:]]


def arrays(run):
    return [np.asarray(x) for x in jax.tree.leaves((run.params, run.ema_params))]


def forget(directory):
    shutil.rmtree(directory / "checkpoints")


@pytest.mark.slow
def test_there_and_back_again_is_free_and_the_same(tmp_path, witness):
    """A, then B with another call size (refused: nothing is left), then A again: its very bits."""
    first = train(tmp_path)
    forget(tmp_path)
    other = train(tmp_path, experiment=E.replace(physical_batch_size=8))
    assert other.steps == 0 and "would exceed" in other.stopped
    forget(tmp_path)
    again = train(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(first), arrays(again), strict=True))
    assert again.steps == STEPS == len(lines(tmp_path)) == witness.check()


@pytest.mark.slow
def test_a_job_that_is_killed_early_and_tried_once_with_other_settings(tmp_path, witness):
    """What B does is charged beside A's steps, so that A cannot end; nothing is released for nothing."""
    train(tmp_path, stop_at_step=2)
    forget(tmp_path)
    train(tmp_path, experiment=E.replace(physical_batch_size=8), stop_at_step=1)
    forget(tmp_path)
    again = train(tmp_path)
    assert again.steps == STEPS - 1 and "would exceed" in again.stopped
    assert len(lines(tmp_path)) == STEPS == witness.check()


@pytest.mark.slow
def test_settings_that_no_list_knows(tmp_path, witness, monkeypatch, registered):
    """The bits differ though all known settings agree: thrown away unseen, drawn afresh, charged."""
    monkeypatch.setattr(session, "settings_of", lambda *_: "the same")
    train(tmp_path, stop_at_step=3, model=None)
    forget(tmp_path)
    before = jax.config.jax_threefry_partitionable
    try:
        jax.config.update("jax_threefry_partitionable", not before)
        jax.clear_caches()
        other = train(tmp_path, model=None)
    finally:
        jax.config.update("jax_threefry_partitionable", before)
        jax.clear_caches()
    assert other.steps == 3 and "would exceed" in other.stopped  # three were spent before
    assert len(lines(tmp_path)) == STEPS == witness.check()
    assert len({line["stream"] for line in lines(tmp_path)}) == 2
    again = train(tmp_path, stop_at_step=3, model=None)  # goes on from the other's checkpoint
    assert again.steps == 3 and len(lines(tmp_path)) == STEPS == witness.check()


@pytest.mark.slow
def test_known_settings_are_not_even_compared(tmp_path, monkeypatch, registered):
    """Noise is fresh from the first repeated step on, so that nothing shows whether two programs round alike."""
    streams, real = [], Payer.__init__

    def watched(payer, *args):
        real(payer, *args)
        streams.append((payer.stream, tuple(np.asarray(payer._key).tolist())))

    monkeypatch.setattr(Payer, "__init__", watched)
    train(tmp_path, model=None, stop_at_step=1)
    for name, value in [("default_matmul_precision", "highest"), ("threefry_partitionable", False)]:
        forget(tmp_path)
        with getattr(jax, name)(value):
            train(tmp_path, model=None, stop_at_step=1)
    forget(tmp_path)
    train(tmp_path, model=None, stop_at_step=1)
    assert len(set(streams)) == 3 and streams[0] == streams[-1] and len(lines(tmp_path)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_history(tmp_path, witness, monkeypatch, seed):
    """Deaths, lost, older and restored checkpoints, copies of the folder, settings known and unknown."""
    rng, folders, kept = random.Random(seed), [tmp_path / "0"], []
    train(tmp_path / "0", stop_at_step=1)
    settings_of = settings.settings_of
    for life in range(7):
        folder = rng.choice(folders)
        event = rng.choice(["forget", "newest", "keep", "restore", "copy", "nothing"])
        saved = folder / "checkpoints"
        steps = sorted(int(p.name) for p in saved.iterdir() if p.name.isdigit()) if saved.exists() else []
        if event == "forget" and saved.exists():
            forget(folder)
        elif event == "newest" and len(steps) > 1:
            shutil.rmtree(saved / str(steps[-1]))
        elif event == "keep" and saved.exists():
            kept.append((folder, shutil.copytree(saved, tmp_path / f"kept-{life}")))
        elif event == "restore" and kept:
            folder, copy = rng.choice(kept)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            shutil.copytree(copy, folder / "checkpoints")
        elif event == "copy":
            folders.append(shutil.copytree(folder, tmp_path / f"copy-{life}"))
            folder = folders[-1]
        with monkeypatch.context() as patch:
            if rng.random() < 0.5:  # nobody knows what differs
                patch.setattr(session, "settings_of", lambda e, *_: "the same")
            else:
                patch.setattr(session, "settings_of", settings_of)
            die, calls = (
                rng.choice([None, (replay, "one_update"), (Ledger, "charge"), (loop, "curve_point")]),
                [],
            )
            if die:
                original, at, after = getattr(*die), rng.randrange(1, 6), rng.random() < 0.5

                def dying(*args, original=original, at=at, after=after, calls=calls, **kwargs):
                    calls.append(1)
                    if len(calls) == at and not after:
                        raise Interrupt
                    result = original(*args, **kwargs)
                    if len(calls) == at:
                        raise Interrupt
                    return result

                patch.setattr(*die, dying)
            with contextlib.suppress(Interrupt):
                train(folder, experiment=E.replace(physical_batch_size=rng.choice([4, 4, 8])))
        witness.check()
        for each in folders:
            assert len(lines(each)) <= STEPS
    assert witness.check() > 1


def test_a_refused_start_leaves_no_trace(tmp_path):
    """While another run goes on, and with a secret seed: nothing is written, and the first one's end is the same."""
    e = E.replace(seed=None)
    train(tmp_path, experiment=e, stop_at_step=3)
    private = tmp_path / "private"
    before = {p: p.read_bytes() for p in private.rglob("*") if p.is_file()}
    with Ledger.open(private / "ledger.jsonl"):
        for experiment in (e, e.replace(physical_batch_size=8)):
            with pytest.raises(LedgerLocked):
                train(tmp_path, experiment=experiment)
    assert {p: p.read_bytes() for p in private.rglob("*") if p.is_file()} == before
    assert train(tmp_path, experiment=e).events[0]["steps"] == STEPS


@pytest.mark.slow
def test_a_start_that_fails_leaves_no_trace(tmp_path, monkeypatch):
    """Not the budget, nor settings, nor noise: the next run is as if it had been the first."""

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(replay, "one_update", fail)
        train(
            tmp_path / "a", experiment=E.replace(epsilon=100.0, noise_multiplier=3.0, physical_batch_size=8)
        )
    assert not (tmp_path / "a" / "ledger.jsonl").exists()
    a, b = train(tmp_path / "a"), train(tmp_path / "b")
    assert all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def test_stopping_behind_a_checkpoint_spends_nothing(tmp_path):
    train(tmp_path, stop_at_step=3)
    again = train(tmp_path, stop_at_step=1)
    assert again.steps == 3 and "on purpose" in again.stopped and len(lines(tmp_path)) == 3


@pytest.mark.slow
def test_the_shown_epsilon_counts_what_was_charged_twice(tmp_path):
    e = E.replace(epsilon=50.0)
    train(tmp_path, experiment=e, stop_at_step=4)
    forget(tmp_path)
    run = train(tmp_path, experiment=e.replace(physical_batch_size=8))
    assert len(lines(tmp_path)) == 4 + STEPS and run.history[-1]["epsilon"] == 50.0
    spent = [p["epsilon"] for p in run.history]
    charged = [p["step"] + min(p["step"], 4) for p in run.history]  # of steps up to there, in both lives
    true = [privacy.epsilon(e.mechanism(64), n, e.delta, e.accountant) for n in charged]
    assert all(shown >= least for shown, least in zip(spent, true, strict=True))


def test_parameters_that_are_no_numbers_end_the_run(tmp_path):
    """Instead of spending the rest of the budget on noise."""
    run = train(tmp_path, experiment=E.replace(learning_rate=1e38))
    assert run.steps < 2 and "lower the learning rate" in run.stopped and len(lines(tmp_path)) <= 2
    assert all(np.isfinite(x).all() for x in arrays(run))
    assert train(tmp_path, experiment=E.replace(learning_rate=1e38)).steps == run.steps
    assert len(lines(tmp_path)) <= 2


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path):
    """The older one goes on, and ends as if nothing had happened; the steps between are repeated for nothing."""
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", stop_at_step=4)
    newest = tmp_path / "run" / "checkpoints" / "4"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="checkpoints/4 must be whole.*going on from an older one"):
        run = train(tmp_path / "run")
    assert all(np.array_equal(a, b) for a, b in zip(arrays(run), arrays(whole), strict=True))
    assert len(lines(tmp_path / "run")) == STEPS
    assert (tmp_path / "run" / "damaged-checkpoint-4").is_dir()


def test_no_readable_checkpoint_names_the_folder(tmp_path):
    train(tmp_path, stop_at_step=2)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(b"damaged")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=f"{tmp_path}/checkpoints must be readable.*delete it"),
    ):
        train(tmp_path)


@pytest.mark.slow
def test_a_directory_holds_runs_of_one_kind(tmp_path):
    train(tmp_path / "public", stop_at_step=1)
    with pytest.raises(ValueError, match="holds another one, with a published seed"):
        train(tmp_path / "public", experiment=E.replace(seed=None))
    train(tmp_path / "secret", experiment=E.replace(seed=None), stop_at_step=1)
    with pytest.raises(ValueError, match="holds another one, with a secret seed"):
        train(tmp_path / "secret")


MODES = {
    "float64": {"JAX_ENABLE_X64": "1"},
    "rbg": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
}
MODE = """
import sys, jax, tiny
from dpnb import training
e = tiny.experiment(augmult=1, steps=2)
run = training.train(e, tiny.data(), sys.argv[1], model=tiny.Linear(), devices=jax.devices()[:1])
print(run.steps, run.params["layer"]["kernel"].dtype, run.ema.accuracy)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_usual_modes_of_jax(tmp_path, mode):
    environment = shared_runs.with_helpers(**MODES[mode])
    command = [sys.executable, "-c", MODE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("2 float32") and len(lines(tmp_path)) == 2
    assert seeds.run_seed(tmp_path, 3) == (3, "seed 3")
