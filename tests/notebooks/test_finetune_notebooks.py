"""The notebooks of public pre-training and private fine-tuning, executed by papermill."""

import json

import nbformat
import pytest
import shared_runs
from shared_runs import execute
from test_studies import CHANGES

from dpnb import data, experiments, training
from dpnb.models.weights import catalogue as pretrained

pytestmark = pytest.mark.notebook


def figures(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


def test_pretraining_saves_weights_that_fine_tuning_takes(tmp_path):
    changes = {"dataset": "digits", "steps": 2, "expected_batch_size": 8, "physical_batch_size": 4}
    outputs, text = execute("pretrain_public.ipynb", tmp_path, bare=True, changes=changes)
    assert figures(outputs) == 4
    assert "NOT differentially private" in text and "of the same class" in text
    (path,) = (tmp_path / "runs" / "pretrain" / "textures").glob("*/ema.safetensors")
    assert pretrained.saw(path).startswith("digits, as pretrain/textures (fingerprint ")
    # The digits that these weights saw are refused as private data.
    e = experiments.get("cifar10/finetune/all/eps1", "smoke", **{**CHANGES, "pretrained": str(path)})
    with pytest.raises(ValueError, match="must not have seen the private data"):
        training.train(e, data.load("digits"), tmp_path / "x")
    left = [path.name for path in (tmp_path / "x").iterdir()]
    assert left == ["ledger.jsonl.lock"]  # nothing charged or kept


def test_fine_tuning_trains_and_shows(tmp_path):
    """All layers, the last block, the classifier and from scratch: two updates each, on digits."""
    name = "cifar_finetune.ipynb"
    outputs, text = execute(name, tmp_path, changes={**CHANGES, "width": 2, "augmult": 0})
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert sorted(r["hyper_parameters"]["trainable"] for r in records) == [
        "all",
        "all",
        "classifier",
        "last-1",
    ]
    began = {r["experiment"].split("/")[2]: r["pretrained"] for r in records}
    assert began.pop("scratch") is None
    assert all(b["weights"] == "wrn-10-2-tiny-imagenet32" for b in began.values())
    assert figures(outputs) >= 3 and "Tiny ImageNet" in text and "94.8" in text


def test_without_public_images(tmp_path):
    """What is on record, and the pictures of the processes."""
    outputs, text = execute("cifar_no_public_images.ipynb", tmp_path, bare=True)
    assert "cifar10 is not on this machine: nothing is trained" in text
    assert figures(outputs) >= 2 and "scratch/eps1" in text and "textures-all/eps1" in text


def test_records_of_fine_tuning_are_shown(tmp_path):
    outputs, text = execute("cifar_finetune.ipynb", tmp_path, bare=True)
    assert "cifar10 is not on this machine: nothing is trained" in text
    assert "**teach**" in text and figures(outputs) >= 3


def test_all_notebooks_are_executed_somewhere():
    from test_studies import PATTERNS

    mine = {"pretrain_public.ipynb", "cifar_finetune.ipynb", "cifar_no_public_images.ipynb"}
    mine |= {"imagenet_from_scratch.ipynb", "imagenet_finetune.ipynb"}  # in test_imagenet_notebooks.py
    mine |= {"demo.ipynb"}  # in test_demo.py
    folder = shared_runs.NOTEBOOK.parent
    assert {path.name for path in folder.glob("*.ipynb")} == {*PATTERNS, *mine, shared_runs.NOTEBOOK.name}
    assert all(nbformat.read(folder / name, 4).cells for name in mine)
