"""What a run with a secret seed releases holds nothing exact about its training data, byte by byte."""

import base64
import copy
import dataclasses
import json
import math
import pathlib
import re
import types

import nbformat
import numpy as np
import pytest
import shared_runs
from safetensors import safe_open

from dpnb import cli, data, experiments, results, sweep
from dpnb.experiments import Experiment
from dpnb.results import release
from dpnb.training import Run

STATISTICS = ("train_loss", "train_accuracy", "mean_norm", "clipped_fraction")  # of a point of the curve
WORDS = ("batch_size", "nonfinite", "unreadable", *STATISTICS)
PNG = (b"\x89PNG", base64.b64encode(b"\x89PNG\r\n")[:8])


def leaks(folder, full, secret, images) -> set[str]:
    """What of a run's secrets is in the bytes of the folder's files, by kind.

    Statistics are looked for by nine of their digits, which a file of some hundred random numbers holds by chance
    once in a million times.

    Args:
      full: the full record.
      secret: the content of seed.secret.
      images: the training images, uint8 [n, h, w, c].
    """
    values = [point[name] for point in full["curve"] for name in STATISTICS]
    # A fraction of a batch may be that of the test images too, which is released: 2 of 22 are 27 of 297.
    tested = [p[k] for p in full["curve"] for k in ("raw_accuracy", "ema_accuracy") if k in p]
    released = {repr(v)[:10] for v in (*tested, *full["accuracy"].values())}
    seed = int(secret["seed"])
    wanted = {
        "fingerprint": [full["data"]["fingerprint"][:16]],
        "statistic": [
            *({repr(v)[:10] for v in values if len(repr(v)) > 10} - released),
            repr(full["seconds"])[:8],
        ],
        "word": [f'"{word}"' for word in WORDS] + ["examples/s"],
        "seed": [str(seed), f"{seed:x}", seed.to_bytes(32), seed.to_bytes(32, "little")],
        "label": [secret["label"]],
        "figure": PNG,
        "image": [image.tobytes() for image in images],
    }
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {
        kind
        for kind, texts in wanted.items()
        if any((t.encode() if isinstance(t, str) else t) in content for t in texts for content in files)
    }


def bands_run(**changes) -> Run:
    """A run on `bands` that nobody trained, with statistics of many digits."""
    e = Experiment(
        name="bands/made", dataset="bands", depth=10, width=1, epsilon=8.0, delta=1e-3, steps=2,
        expected_batch_size=48, seed=None, noise_multiplier=2.0, **changes,
    )  # fmt: skip
    point = {
        "step": 2, "epsilon": 1.12693, "batch_size": 47, "train_loss": 2.3456789012345, "train_accuracy": 43.210987654321,
        "mean_norm": 1.2345678901234, "clipped_fraction": 0.98765432109876, "nonfinite": 0, "unreadable": 0,
        "raw_accuracy": 50.0, "ema_accuracy": 60.0,
    }  # fmt: skip
    raw, ema = (types.SimpleNamespace(accuracy=accuracy, loss=1.0) for accuracy in (50.0, 60.0))
    return Run(
        experiment=e, params={"w": np.ones(3)}, ema_params={"w": np.ones(3)}, history=[point], raw=raw,
        ema=ema, events=[{**vars(e.mechanism(96)), "steps": 2}], steps=2, seconds=12.345678901, devices="1 x cpu",
        computed_in="float32", evaluated_in="float32", public=None, choices=[], stopped="",
    )  # fmt: skip


def secrets_of(out):
    """(full record, content of seed.secret) of a run's directory."""
    private = out / "private"
    return (json.loads((private / name).read_text()) for name in (release.FULL_RECORD, "seed.secret"))


@pytest.fixture
def made(tmp_path):
    """What `results.save` leaves of that run."""
    run = bands_run()
    result = results.save(run, shared_runs.bands(), tmp_path)
    full, secret = secrets_of(tmp_path)
    return types.SimpleNamespace(run=run, result=result, out=tmp_path, full=full, secret=secret)


@pytest.fixture(scope="module")
def demo():
    """`dpnb run digits/wrn-10-1 --secret-seed`, three updates long."""
    out = shared_runs.temporary("secret-demo")
    sets = [f"--set={pair}" for pair in shared_runs.SMALL]
    arguments = ("run", "digits/wrn-10-1", "--preset=smoke", "--secret-seed", *sets, f"--out={out}")
    done = shared_runs.python("-m", "dpnb.cli", *arguments)
    assert done.returncode == 0, done.stderr
    full, secret = secrets_of(out)
    return types.SimpleNamespace(out=out, stdout=done.stdout, full=full, secret=secret)


def test_a_released_record_holds_nothing_exact(made):
    images = shared_runs.bands().train.images
    assert not leaks(made.out / "release", made.full, made.secret, images)
    assert leaks(made.out / "private", made.full, made.secret, images) >= {
        "fingerprint", "statistic", "word", "seed", "label",
    }  # fmt: skip
    assert {p.name for p in (made.out / "release").iterdir()} == {
        "ema.safetensors",
        "privacy.md",
        "result.json",
    }
    assert made.result == json.loads((made.out / "release" / "result.json").read_text())
    assert made.result["curve"] == [
        {"step": 2, "epsilon": 1.12693, "raw_accuracy": 50.0, "ema_accuracy": 60.0}
    ]
    assert made.full["curve"] == made.run.history


def test_a_new_item_of_a_record_is_not_released():
    full = results.record(bands_run(), shared_runs.bands())
    point = {**full["curve"][0], "gradient_variance": 0.1}
    assert release.record({**full, "gradients": [0.1], "curve": [point]}, 7) == release.record(full, 7)


def test_a_released_record_is_read_like_any_other(made):
    (record,) = results.load(made.out)
    assert record == made.result and set(record) == set(made.full)
    name, preset = "cifar10/wrn-40-4/eps8", "paper"
    e, record = (
        experiments.get(name, preset),
        release.record(shared_runs.record_of(name, preset, 60.0, None), 7),
    )
    (row,) = results.table(name, [record]).to_dict("records")
    assert (row["ours"], row["minutes"]) == ("60.0", "-")
    assert math.isnan(results.summary([e], [record])["minutes"][0])
    assert "minutes" not in results.row(record) and "on 1 x cpu" not in results.row(record)


def test_the_owner_recognises_the_data(made):
    bands = shared_runs.bands()
    name = release.keyed(bands.fingerprint, made.secret["seed"])
    assert made.result["data"]["fingerprint"] == name != release.keyed(bands.fingerprint, 0)
    with safe_open(made.out / "release" / "ema.safetensors", "numpy") as weights:
        assert name in weights.metadata()["saw"]
    assert made.full["data"]["fingerprint"] == bands.fingerprint


def test_a_finished_secret_run_is_found(made):
    """By its full record alone, and for its own images alone."""
    e, bands = made.run.experiment, shared_runs.bands()
    (full,) = results.load(made.out, release.FULL_RECORD)
    assert sweep.finished(e, bands, [full]) == full and sweep.finished(e, bands, [made.result]) is None
    images = bands.train.images.copy()
    images[0] ^= 1
    other = dataclasses.replace(bands, train=data.Split(images, bands.train.labels))
    assert sweep.finished(e, other, [full]) is None


def test_a_sweep_skips_a_finished_secret_run(made, monkeypatch):
    monkeypatch.setattr(sweep.training, "train", lambda *_, **__: pytest.fail("trained again"))
    said = []
    done = sweep.run([made.run.experiment], shared_runs.bands(), made.out, said.append)
    assert done.records == [made.full] and said == ["1 cells, 1 of them finished"]


def test_who_may_read_what(made):
    private = made.out / "private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert (private / "seed.secret").stat().st_mode & 0o777 == 0o600
    assert {p.name for p in made.out.iterdir()} == {"private", "release"}
    ignored = (shared_runs.ROOT / ".gitignore").read_text().splitlines()
    assert {"private/", "seed.secret"} <= set(ignored)


def test_nothing_is_released_without_a_guarantee(tmp_path):
    run = bands_run()
    run = dataclasses.replace(run, events=[{**run.events[0], "noise_multiplier": 0.0}])
    results.save(run, shared_runs.bands(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["private"]
    assert "none of its files may be published" in (tmp_path / "private" / "privacy.md").read_text()


def test_public_data_stay_as_they_were(tmp_path):
    run, bands = bands_run(), shared_runs.bands()
    run = dataclasses.replace(run, experiment=run.experiment.replace(seed=0))
    made = results.save(run, bands, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"ema.safetensors", "privacy.md", "result.json"}
    assert made["curve"] == run.history and made["data"]["fingerprint"] == bands.fingerprint
    assert made["seconds"] == run.seconds


def cell(source, outputs, *tags):
    made = nbformat.v4.new_code_cell(
        source, outputs=outputs, metadata={"tags": [*tags], "execution": {"end": "9"}}
    )
    return json.loads(json.dumps(made))


def test_a_released_notebook_keeps_the_text_of_tagged_cells_only():
    out = nbformat.v4.new_output
    markdown = out("display_data", {"text/markdown": "kept", "text/plain": "x"}, metadata={"at": 1})
    outputs = [
        out("stream", name="stdout", text="printed"), markdown, out("stream", name="stderr", text="photo 7 is broken"),
        out("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "figure"}), out("execute_result", {"text/plain": "3"}),
        out("error", ename="E", evalue="image 3", traceback=["image 3"]),
    ]  # fmt: skip
    notebook = nbformat.v4.new_notebook(
        metadata={
            "papermill": {"duration": 9.5},
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
        }
    )
    executed = {**notebook, "cells": [cell("a", outputs, "release"), cell("b", outputs), cell("c", [])]}
    before = copy.deepcopy(executed)
    made = release.notebook(executed)
    assert executed == before
    nbformat.validate(made)
    tagged, other, silent = (c["outputs"] for c in made["cells"])
    note = {"output_type": "stream", "name": "stdout", "text": release.LEFT_OUT}
    assert [o.get("text") or o["data"] for o in tagged] == [
        "printed",
        {"text/markdown": "kept"},
        release.LEFT_OUT,
    ]
    assert other == [note] and silent == []
    assert not re.search(
        'duration|execution"|photo|image 3', json.dumps(made["cells"]) + json.dumps(made["metadata"])
    )


@pytest.mark.parametrize("name", ["cifar10_from_scratch", "imagenet_from_scratch"])
def test_tagged_cells_do_not_touch_training_statistics(name):
    """What they print are settings, counts taken as public, evaluation results and the released record."""
    cells = nbformat.read(shared_runs.NOTEBOOK.parent / f"{name}.ipynb", 4).cells
    tagged = [c for c in cells if release.TAG in c.metadata.get("tags", ())]
    assert len(tagged) >= 5 and "results.statement(result)" in tagged[-1].source
    for c in tagged:
        assert not re.search(r"train\.(images|labels|read|source)|\brun\.|history|warn", c.source), c.source
    assert "do not publish it" in cells[-1].source


def test_a_failing_secret_run_leaves_its_notebook_in_private(tmp_path, monkeypatch, capsys):
    import papermill

    def fail(source, executed, *_, **__):
        executed = pathlib.Path(executed)
        assert executed.parent == tmp_path / "private" and executed.parent.stat().st_mode & 0o777 == 0o700
        raise papermill.PapermillExecutionError(0, 1, "x = loaded", "DataError", "no data", [])

    monkeypatch.setattr(papermill, "execute_notebook", fail)
    assert cli.main(["run", "digits/wrn-10-1", "--secret-seed", f"--out={tmp_path}"]) == 1
    assert str(tmp_path / "private" / "unfinished-cifar10_from_scratch.ipynb") in capsys.readouterr().out


def test_pretraining_has_no_secret_seed(tmp_path, capsys):
    assert cli.main(["run", "pretrain/textures", "--secret-seed", f"--out={tmp_path / 'x'}"]) == 2
    assert "pre-training promises no privacy" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_the_notebook_leaves(demo):
    images = data.load("digits").train.images
    assert {p.name for p in demo.out.iterdir()} == {"private", "release"}
    assert not leaks(demo.out / "release", demo.full, demo.secret, images)
    found = leaks(demo.out / "private", demo.full, demo.secret, images)
    assert found >= {"fingerprint", "statistic", "word", "seed", "label", "figure"}
    private = {p.name for p in (demo.out / "private").iterdir()}
    assert {"checkpoints", "ledger.jsonl", "curve.png", shared_runs.NOTEBOOK.name} <= private
    assert demo.out.joinpath("private").stat().st_mode & 0o777 == 0o700
    assert demo.out.joinpath("private", "seed.secret").stat().st_mode & 0o777 == 0o600


def test_the_released_notebook(demo):
    """Every cell is there; the row and the statement are shown, and nothing of the training is."""
    made, whole = (nbformat.read(demo.out / f / shared_runs.NOTEBOOK.name, 4) for f in ("release", "private"))
    nbformat.validate(made)
    assert [c.source for c in made.cells] == [c.source for c in whole.cells]
    shown = json.dumps([c.get("outputs") for c in made.cells])
    for said in (
        "1500 training and",
        "update",
        "digits/wrn-10-1 [smoke, seed None]",
        "NOT protected",
        "left out",
    ):
        assert said in shown, said
    assert "update 3/3" not in shown and "minutes in" not in shown and "done: 3 updates" not in shown


def test_the_statement_lists_what_is_released(demo):
    (files,) = [
        p for p in (demo.out / "release" / "privacy.md").read_text().split("\n\n") if p.startswith("Files:")
    ]
    released = {p.name for p in (demo.out / "release").iterdir()}
    assert released == {"ema.safetensors", "result.json", "privacy.md", shared_runs.NOTEBOOK.name}
    assert not [name for name in released - {shared_runs.NOTEBOOK.name} if f"`{name}`" not in files]
    assert "executed notebook" in files and "rests on the guarantee" in files
    assert f"may be published, see privacy.md there: {demo.out / 'release'}" in demo.stdout
