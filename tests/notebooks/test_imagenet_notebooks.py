"""ImageNet's two notebooks, executed on digits as JPEG files, and the program for several hosts."""

import json
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
    # Less to compute, in the program for several hosts too, which takes these over.
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


@pytest.mark.distributed
def test_the_program_for_several_hosts(scratch, tmp_path):
    """Two processes on this machine, as the notebook says; the record is the first one's."""
    *_, folder = scratch
    port = shared_runs.free_port()
    command = [sys.executable, folder / "train_on_hosts.py", f"127.0.0.1:{port}", "2"]
    processes = [
        subprocess.Popen(
            [*map(str, [*command, rank, tmp_path])], env=shared_runs.environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=800)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said[0][-2000:]
    two, one = (json.loads((place / "result.json").read_text()) for place in (tmp_path, folder))
    assert two["devices"].startswith("2 x") and one["devices"].startswith("1 x")
    assert two["privacy"] == one["privacy"] and "EMA" in said[0]
    losses = [[point["train_loss"] for point in record["curve"]] for record in (two, one)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)  # the same photographs and views


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
