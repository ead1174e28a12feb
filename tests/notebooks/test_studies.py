"""Each study's notebook, executed by papermill: two cells trained for two updates, all records shown."""

import json
import re
import runpy

import nbformat
import pytest
import shared_runs
from shared_runs import execute

from dpnb import results, sweep
from dpnb.commands import classes
from dpnb.experiments import studies

PATTERNS = {  # a part of each study
    "cifar10_ablation.ipynb": "cifar10/ablation/[35]-*",
    "cifar10_augmult.ipynb": "cifar10/augmult/k[01]",
    "cifar10_batch_noise_steps.ipynb": "cifar10/batch/*256",
    "cifar10_depth_width.ipynb": "cifar10/depth-width/[dw]1*",
    "cifar10_lr_clip.ipynb": "cifar10/lr-clip/lr2-c1*",
    "cifar10_table.ipynb": "cifar10/scatter-linear/eps[38]",
}
CHANGES = dict(
    dataset="digits", delta=1e-4, steps=2, expected_batch_size=8, physical_batch_size=2, accountant="rdp",
    eval_every=0, depth=10, width=1,
)  # fmt: skip


def test_every_study_has_a_notebook():
    folder = shared_runs.NOTEBOOK.parent
    assert set(PATTERNS) == {*studies.STUDIES.values(), "cifar10_table.ipynb"}
    assert all((folder / name).exists() for name in PATTERNS)
    assert {path.name for path in folder.glob("cifar10_*.ipynb")} == {*PATTERNS, "cifar10_from_scratch.ipynb"}


@pytest.mark.notebook
@pytest.mark.parametrize("name", PATTERNS)
def test_shows_what_is_on_record(name, tmp_path):
    """From top to bottom in a bare folder, without CIFAR and a network: the committed runs, once, each with its scale
    and count, and a sentence that says so."""
    outputs, text = execute(name, tmp_path, bare=True)
    assert "no network to https://" in text and "170 MB" not in text
    assert "cifar10 is not on this machine: nothing is trained, and the runs on record are shown" in text
    assert not (tmp_path / "runs").exists()
    figures = {
        "cifar10_ablation.ipynb": 3,
        "cifar10_batch_noise_steps.ipynb": 5,
        "cifar10_depth_width.ipynb": 2,
        "cifar10_table.ipynb": 2,
    }
    assert sum("image/png" in o.get("data", {}) for o in outputs) == figures.get(name, 1)
    assert "Images of these runs: 1,020 of the 60,000" in text  # what the records say of them
    scale, network = ("teach", "WRN-10-1") if name != "cifar10_table.ipynb" else ("teach = colab = paper", "")
    assert text.count(f"**{scale}**\n\n| cell | network | B | T | K |") == 1 and f"| {network}" in text


@pytest.mark.notebook
def test_trains_and_shows(tmp_path):
    """Two cells of the ladder on digits, two updates each."""
    name = "cifar10_ablation.ipynb"
    outputs, text = execute(name, tmp_path, pattern=PATTERNS[name], changes=CHANGES)
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert len(records) == 2 and all(r["privacy"]["steps"] == 2 and r["preset"] == "smoke" for r in records)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert "of updates on" in text and "EMA" in text


SHOWN = runpy.run_path(str(shared_runs.NOTEBOOK.parent / "execute.py"))["NAMES"]


def test_all_lectures_and_studies_have_an_executed_copy_and_no_answer_is_in_it():
    """Those that train as they stand, and the two of single cells, have none."""
    folder = shared_runs.NOTEBOOK.parent
    everything = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.ipynb")}
    training = {
        "demo",
        "cifar10_from_scratch",
        "pretrain_public",
        "imagenet_from_scratch",
        "imagenet_finetune",
    }
    assert set(SHOWN) == everything - training
    for name in SHOWN:
        if name.startswith("learn/"):
            cells = nbformat.read(shared_runs.ROOT / "results" / "notebooks" / f"{name}.ipynb", 4).cells
            assert not [
                c
                for c in cells
                if "solution" in c.metadata.get("tags", ()) or "# @title Solution" in c.source
            ]
            said = "".join(o.get("text", "") for c in cells for o in c.get("outputs", ()))
            assert "no answer yet" in said and not re.search("^right$", said, re.M)


@pytest.mark.parametrize("name", SHOWN)
def test_the_executed_copy_is_that_of_the_notebook(name):
    """Nothing in it is older than the notebook; to renew it: python notebooks/execute.py NAME."""
    shown = nbformat.read(shared_runs.ROOT / "results" / "notebooks" / f"{name}.ipynb", 4)
    plain = nbformat.read(shared_runs.NOTEBOOK.parent / f"{name}.ipynb", 4)
    cells = [c for c in shown.cells if "injected-parameters" not in c.metadata.get("tags", ())]
    plain = classes.without_solutions(plain) if name.startswith("learn/") else plain
    assert [c.source for c in cells] == [c.source for c in plain.cells]
    outputs = [o for c in cells for o in c.get("outputs", ())]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("study", studies.STUDIES)
def test_the_executed_copy_shows_the_records(study):
    notebook = studies.STUDIES[study]
    shown = nbformat.read(shared_runs.ROOT / "results" / "notebooks" / notebook, 4)
    outputs = [o for c in shown.cells for o in c.get("outputs", ())]
    lines = [line for o in outputs for line in o.get("data", {}).get("text/markdown", "").splitlines()]
    frame = sweep.on_record(f"cifar10/{study}/*", "teach", results.load(shared_runs.ROOT / "results"))[
        "teach"
    ]
    for row in results.tidy(frame[frame["first"] & (frame["n"] > 0)]).itertuples():
        same = [
            x
            for x in lines
            if x.startswith(f"| {row.cell} |") and f"| {row.ema} |" in x and f"| {row.n} |" in x
        ]
        assert same, f"{row.cell}: renew it: python notebooks/execute.py {notebook[:-6]}"
