"""Each study's notebook, executed by papermill: two cells trained for two updates, all records shown."""

import json

import nbformat
import pytest
import shared_runs

from dpnb.experiments import studies

PATTERNS = {  # two different experiments each, one program
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


@pytest.mark.parametrize("name", PATTERNS)
def test_runs_from_top_to_bottom(name, tmp_path):
    import yaml

    out = tmp_path / "runs"
    given = dict(pattern=PATTERNS[name], changes=CHANGES, output_dir=str(out), preset="smoke")
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(given))
    executed = tmp_path / name
    done = shared_runs.python(
        "-m", "papermill", shared_runs.NOTEBOOK.parent / name, executed, "-f", tmp_path / "parameters.yaml",
        "--cwd", tmp_path, "--no-progress-bar", "-k", "python3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(file.read_text()) for file in out.rglob("result.json")]
    assert records and all(r["privacy"]["steps"] == 2 and r["preset"] == "smoke" for r in records)
    outputs = [o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", ())]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)
    assert "minutes of training" in text and "EMA" in text
