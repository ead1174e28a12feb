"""What is packed for a machine without a network, and what one sitting there does. benchmarks/bundle.py says how to try it whole."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import pytest
import shared_runs

from dpnb import data, experiments

sys.path.insert(0, str(shared_runs.ROOT / "benchmarks"))

import bundle
import sitting

SPEED = {
    "flops_per_view": 2.2e9,
    "formulations": {"auto": {"us_per_view": 20.0}, "sliced": {"us_per_view": 25.0}},
}


def candidate(name, seconds, state=""):
    return sitting.Candidate(experiments.get(name), seconds, state)


def test_the_cell_that_fits():
    short, long, longer = (candidate(f"cifar10/wrn-16-4/eps{e}", 100.0 * e) for e in (1, 3, 8))
    assert sitting.choose([short, long, longer], 500) == long
    assert sitting.choose([short, long, longer], 50) == short  # which is begun
    begun = short._replace(state="begun")
    assert sitting.choose([long, begun, longer], 500) == begun
    done = [c._replace(state="finished") for c in (short, long)]
    assert sitting.choose([*done, longer], 10) == longer and sitting.choose(done, 500) is None


@pytest.mark.parametrize("files, state", [
    ({}, ""),
    ({"ledger.jsonl": "{}"}, "begun"),
    ({"ledger.jsonl": "{}", "result.json": '{"stopped": "stopped in time after 3 of 9 updates"}'}, "begun"),
    ({"ledger.jsonl": "{}", "result.json": '{"stopped": ""}'}, "finished"),
    ({"ledger.jsonl": "{}", "result.json": '{"stopped": "the budget is spent"}'}, "finished"),
])  # fmt: skip
def test_what_there_is_of_a_run(files, state, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert sitting.state_of(tmp_path) == state


def test_candidates_are_what_the_images_serve(tmp_path):
    """Each program once; a wider network takes as much longer as it has more FLOP."""
    images = types.SimpleNamespace(name="cifar10")
    patterns = (
        "cifar10/wrn-16-4/*",
        "cifar10/scatter-linear/*",
        "cifar10/finetune/all/*",
        "digits/*",
        "cifar10/depth-width/w8",
    )
    found = {c.experiment.name: c for c in sitting.candidates(patterns, "paper", images, SPEED, tmp_path)}
    assert found.keys() == {*experiments.names("cifar10/wrn-16-4/*"), "cifar10/depth-width/w8"}
    eps1, wide = found["cifar10/wrn-16-4/eps1"], found["cifar10/depth-width/w8"]
    views = 875 * 4096 * 16
    assert eps1.seconds - sitting.OVERHEAD == pytest.approx(views * 20e-6 * sitting.SLOWER, rel=0.01)
    per_view = [
        (c.seconds - sitting.OVERHEAD) / c.experiment.steps / c.experiment.augmult for c in (eps1, wide)
    ]
    assert 3.5 < per_view[1] / per_view[0] < 4.1  # twice as wide


def test_formulations_are_timed_beside_the_floor(monkeypatch):
    """And are not timed again in another sitting, but those for which no time was left."""
    monkeypatch.setattr(sitting, "FORMULATIONS", ("auto", "unrolled"))
    monkeypatch.setattr(sitting, "VIEWS", {"cpu": 2})
    e, images, said = experiments.get("digits/wrn-10-1", "smoke"), data.load("digits"), []
    late = sitting.measure(e, images, {}, time.monotonic() - 1, said.append)
    assert not said and {row["why"] for row in late["formulations"].values()} == {sitting.LATE}
    with pytest.raises(ValueError, match="must have been timed"):
        sitting.fastest(late)
    late["formulations"]["unrolled"] = {"examples": 2, "us_per_view": 1e9}
    speed = sitting.measure(e, images, late, time.monotonic() + 600, said.append)
    auto = speed["formulations"]["auto"]
    assert (
        len(said) == 1
        and said[0].startswith("auto: ")
        and speed["formulations"]["unrolled"]["us_per_view"] == 1e9
    )
    assert auto["ratio"] == pytest.approx(auto["us_per_view"] / speed["floors"]["2"])
    assert 0 < auto["share_of_peak"] < 1 and auto["memory"] > 0
    assert sitting.fastest(speed) == auto["us_per_view"] and json.loads(json.dumps(speed)) == speed


@pytest.fixture
def trained(monkeypatch):
    """The names of the cells that a sitting trains, which a stub of `cell.main` has to note; nothing is measured."""
    monkeypatch.setattr(sitting.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(
        sitting, "measure", lambda e, *_: {**SPEED, "device": "x", "like": e.name, "preset": e.preset}
    )
    return []


def test_a_sitting_goes_on_and_ends_in_time(trained, monkeypatch, tmp_path, capsys):
    """It trains one cell after another, and hands its exit status on where it has to stop."""

    def train(arguments):
        trained.append(arguments[0])
        run = pathlib.Path(arguments[1])
        assert run == tmp_path / "runs" / arguments[0] / "paper-seed0"
        run.mkdir(parents=True, exist_ok=True)
        (run / "ledger.jsonl").touch()
        if len(trained) == 2:
            raise SystemExit(3)
        (run / "result.json").write_text('{"stopped": ""}')

    monkeypatch.setattr(sitting.cell, "main", train)
    monkeypatch.setattr(sitting, "candidates", lambda *given: [
        candidate(f"cifar10/wrn-16-4/eps{e}", 100.0 * e, sitting.state_of(tmp_path / "runs" / f"cifar10/wrn-16-4/eps{e}" / "paper-seed0"))
        for e in (1, 3)
    ])  # fmt: skip
    arguments = [str(tmp_path), "--like", "digits/wrn-10-1", "--minutes"]
    assert sitting.main([*arguments, "4"]) == 3
    assert sitting.main([*arguments, "0.1"]) == 3  # too short for anything
    assert sitting.main([*arguments, "4"]) == 0
    assert trained == [f"cifar10/wrn-16-4/eps{e}" for e in (1, 3, 3)]
    assert json.loads((tmp_path / "speed.json").read_text())["device"] == "x"
    assert "every cell is finished" in capsys.readouterr().out
    monkeypatch.setattr(sitting, "measure", lambda *_: {"formulations": {"auto": {"why": sitting.LATE}}})
    assert sitting.main([*arguments, "4"]) == 3 and "no time was left to measure" in capsys.readouterr().out


def test_a_cell_that_fails_does_not_cost_the_others_their_minutes(trained, monkeypatch, tmp_path, capsys):
    def train(arguments):
        trained.append(arguments[0])
        if len(trained) == 1:
            raise ValueError("another experiment's run is there")

    def cells(*_):
        finished = {name: "finished" for name in trained[1:]}
        names = [f"cifar10/wrn-16-4/eps{e}" for e in (1, 3)]
        return [candidate(name, 100.0, finished.get(name, "")) for name in names]

    monkeypatch.setattr(sitting.cell, "main", train)
    monkeypatch.setattr(sitting, "candidates", cells)
    assert sitting.main([str(tmp_path), "--like", "digits/wrn-10-1", "--minutes", "4"]) == 1
    assert trained == ["cifar10/wrn-16-4/eps1", "cifar10/wrn-16-4/eps3"]
    said = capsys.readouterr()
    assert "another experiment's run is there" in said.err and "failed: cifar10/wrn-16-4/eps1" in said.out


SCRIPT = "import sys, dpnb; print(dpnb.__file__, *sys.argv[1:])"


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A bundle whose only wheel is dpnb's, for a Python that has the rest; its benchmarks are a script that says what it was given."""

    def wheels(out, *_):
        shutil.copy(shared_runs.installed().wheel, out)
        return ["dpnb"]

    monkeypatch.setattr(bundle, "wheels", wheels)
    bundle.main([str(tmp_path / "bundle"), "--accelerator", "present", "--data", "digits"])
    assert {f.name for f in (tmp_path / "bundle" / "benchmarks").iterdir()} == set(bundle.SCRIPTS)
    (tmp_path / "bundle" / "benchmarks" / "sitting.py").write_text(SCRIPT)
    return tmp_path / "bundle"


def test_the_script_installs_from_the_bundle_alone(packed, tmp_path):
    """In a folder elsewhere, without an index, once."""
    there = tmp_path / "with a space"
    packed.rename(there)

    def run(**changes):
        environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **changes}
        environment.pop("PYTHONPATH", None)
        command = ["sh", there / "run.sh", "--minutes", "5"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for _ in range(2):
        done = run()
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{there}/env/dpnb/__init__.py {there}/out --since ")
        assert done.stdout.rstrip().endswith(f"--data-file {there}/data/digits.npz --minutes 5")
        shutil.rmtree(there / "wheels", ignore_errors=True)  # it is installed
    assert (
        data.load("digits", file=there / "data" / "digits.npz").fingerprint == data.load("digits").fingerprint
    )
    text = (there / "run.sh").read_text()
    (there / "run.sh").write_text(text.replace("{}.{}".format(*sys.version_info), "3.7"))
    done = run()
    assert done.returncode == 2 and "the wheels are for Python 3.7" in done.stderr


def test_a_folder_that_is_there_is_left_alone(packed):
    with pytest.raises(SystemExit, match="must not exist"):
        bundle.main([str(packed), "--data", "digits"])
