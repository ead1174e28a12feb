"""ImageNet's two notebooks, executed on digits as JPEG files, and the command for several hosts."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys

import nbformat
import pytest
import shared_runs
from shared_runs import execute

pytestmark = pytest.mark.notebook


def figures(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    # Less to compute, in the command for several hosts too, which takes these over.
    changes = {"width": 0.0625, "eval_examples": 50, "accountant": "rdp"}
    return (*execute("imagenet_from_scratch.ipynb", folder, changes=changes), folder)


def test_training_from_scratch(scratch):
    """On digits as JPEG files: read, drawn, trained, and honest about it."""
    outputs, text, folder = scratch
    assert figures(outputs) == 4
    assert "unreadable photographs in the updates of the curve: 0" in text
    assert "paper:" not in text  # whose number is of other data
    assert "image file is truncated" in text and "photographs a second and core" in text
    assert "impossible in public" in text and "so the two are not comparable" in text
    record = json.loads((folder / "result.json").read_text())
    assert record["hyper_parameters"]["network"] == "nf-resnet" and record["privacy"]["steps"] == 3
    assert record["privacy"]["epsilon_rdp"] == pytest.approx(8, abs=1e-3)
    assert 0 < record["privacy"]["epsilon_pld"] < 8
    assert "unreadable" in record["curve"][0]


def on_two_hosts(text, place):
    """Starts the two commands that the notebook prints, and returns the processes."""
    port, started = shared_runs.free_port(), []
    for line in [line for line in text.splitlines() if line.startswith("JAX_COORDINATOR_ADDRESS=")]:
        words = shlex.split(line.replace("HOST0:1234", f"127.0.0.1:{port}").replace("DIRECTORY", str(place)))
        variables, at = dict(word.split("=", 1) for word in words[:3]), words.index("dpnb")
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dpnb.cli", *words[at + 1 :]], env={**shared_runs.environment(), **variables},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip
    assert len(started) == 2
    return started


@pytest.mark.distributed
def test_the_command_for_several_hosts(scratch, tmp_path):
    """Two processes on this machine, as the notebook says. The first is killed, and both are started once more."""
    _, text, folder = scratch
    first, second = processes = on_two_hosts(text, tmp_path)
    try:
        for line in first.stdout:
            if line.startswith("update 1/3"):
                break
        os.killpg(first.pid, signal.SIGKILL)
        said, errors = second.communicate(timeout=200)
        assert second.returncode == 1 and not (tmp_path / "result.json").exists()
        assert "the same command on every host goes on" in errors.splitlines()[-1] and not said
        paid = (tmp_path / "ledger.jsonl").read_text()
        processes += on_two_hosts(text, tmp_path)
        (said, errors), (silence, _) = (p.communicate(timeout=800) for p in processes[2:])
        assert [p.returncode for p in processes[2:]] == [0, 0], errors[-2000:]
    finally:
        for p in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
    two, one = (json.loads((place / "result.json").read_text()) for place in (tmp_path, folder))
    assert two["devices"].startswith("2 x") and one["devices"].startswith("1 x")
    assert two["privacy"] == one["privacy"] and two["ledger"] == one["ledger"]
    assert "EMA" in said and not silence
    repeated = (tmp_path / "ledger.jsonl").read_text()
    assert repeated.startswith(paid) and repeated.count("released") == 3  # the same updates, to the bit
    for point, alone in zip(two["curve"], one["curve"], strict=True):  # the same photographs and views
        assert point["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-4)
    assert two["accuracy"] == one["accuracy"]


def test_fine_tuning(tmp_path):
    """All layers and the classifier alone, from weights of random textures."""
    outputs, text = execute("imagenet_finetune.ipynb", tmp_path, changes={"accountant": "rdp"})
    assert figures(outputs) == 2 and "JFT-300M" in text
    assert "nfnet-f3-imagenet21k on imagenet2012, classes tench: refused" in text
    assert "nf-resnet-50-imagenet on mine, classes n01440764, n02102040: refused" in text
    assert "nf-resnet-14-textures on imagenet2012, classes tench: allowed" in text
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert sorted(r["hyper_parameters"]["trainable"] for r in records) == ["all", "classifier"]
    assert all(r["pretrained"]["weights"] == "nf-resnet-14-textures" for r in records)
    assert all("no photograph" in r["pretrained"]["saw"] for r in records)


def test_the_notebooks_name_each_other():
    folder = shared_runs.NOTEBOOK.parent
    for name, other in (
        ("imagenet_from_scratch", "imagenet_finetune"),
        ("imagenet_finetune", "imagenet_from_scratch"),
    ):
        assert f"{other}.ipynb" in "".join(c.source for c in nbformat.read(folder / f"{name}.ipynb", 4).cells)
