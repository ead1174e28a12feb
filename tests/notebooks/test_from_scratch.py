"""`dpnb run digits/wrn-10-1`, executed once with the wheel: what it leaves, and what the CIFAR-10 notebook shows."""

import json

import nbformat
import pytest
import shared_runs
import test_notebooks

from dpnb import privacy
from dpnb.results import verification

pytestmark = pytest.mark.notebook
# Cells whose printed output is the same on every machine, by how they start.
DETERMINISTIC = (
    "ours, loaded = notebook.or_embedded(",
    "if ours.augmult == 0",
    "mechanism = ours.mechanism(",
    "display(Markdown(results.statement(",
)


@pytest.fixture(scope="module")
def demo():
    """The one execution of the notebook that these tests and those of the notebook look at."""
    return shared_runs.demo()


def test_run_leaves_everything_behind(demo):
    """Below `runs` in the working directory, and nowhere else."""
    assert demo.out.is_relative_to(demo.work / "runs" / "digits")
    for name in ("cifar10_from_scratch.ipynb", "result.json", "curve.png", "confusion.png", "privacy.md",
                 "ledger.jsonl", "ema.safetensors"):  # fmt: skip
        assert (demo.out / name).stat().st_size > 0, name
    for name in ("curve.png", "confusion.png"):
        assert (demo.out / name).read_bytes()[:4] == b"\x89PNG"
    assert privacy.NEIGHBOURS in (demo.out / "privacy.md").read_text()


def test_run_prints_progress_and_the_row(demo):
    lines = demo.stdout.splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("update ")]
    assert shown and shown[-1] == "3/3"
    *_, row, record, figure, notebook = lines
    assert row.startswith("digits/wrn-10-1 [smoke, seed 0] on digits: EMA ") and "valid epsilon PLD " in row
    for line, name in (
        (record, "result.json"),
        (figure, "curve.png"),
        (notebook, "cifar10_from_scratch.ipynb"),
    ):
        assert demo.work / line.split(": ")[1] == demo.out / name


def test_a_run_that_was_given_too_few_minutes_goes_on(demo):
    """One update a sitting at least; the ledger, in the test below, has three steps."""
    assert (
        demo.first.splitlines()[-1]
        == "stopped in time after 1 of 3 updates; it goes on from there, by the same command"
    )
    assert "update 1/3" not in demo.stdout


def test_run_took_the_changes(demo):
    r = json.loads((demo.out / "result.json").read_text())
    assert (r["experiment"], r["preset"], r["seed"]) == ("digits/wrn-10-1", "smoke", 0)
    assert (r["privacy"]["steps"], r["privacy"]["sampling_probability"]) == (3, 24 / 1500)
    assert r["privacy"]["epsilon_pld"] <= 8.0 and r["privacy"]["epsilon_is"] == "valid"
    assert sum(event["steps"] for event in r["ledger"]) == 3


def test_the_record_verifies(demo):
    report = verification.verify(demo.out)
    assert report.ok, report.lines


def test_whole_notebook(demo):
    """Executed by papermill at preset smoke, few updates long: every cell ran and showed what it should."""
    executed = nbformat.read(demo.out / shared_runs.NOTEBOOK.name, 4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and len(code) == len(test_notebooks.CODE) + 1
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4  # views, budget, curve, confusion
    shown = "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)
    for said in ("FLOP", "update 3/3", "done: 3 updates", "| digits/wrn-10-1 |", "NOT protected"):
        assert said in shown, said
    (injected,) = test_notebooks.tagged("injected-parameters", executed)
    assert test_notebooks.assignments(injected.source)["experiment"] == "digits/wrn-10-1"


def test_nbval_and_running_again(demo, tmp_path):
    """nbval (lax) on the executed notebook: deterministic cells print the same, no cell fails.

    Its output directory holds the finished run, so this is also what running again does: the
    training cell returns the same result without another update or another step in the ledger.
    """
    before = {name: (demo.out / name).read_bytes() for name in ("ledger.jsonl", "ema.safetensors")}
    first = json.loads((demo.out / "result.json").read_text())
    checked = nbformat.read(demo.out / shared_runs.NOTEBOOK.name, 4)
    for start in DETERMINISTIC:
        (cell,) = [c for c in checked.cells if c.cell_type == "code" and c.source.startswith(start)]
        assert cell.outputs
        cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "nbval-check-output"]
    nbformat.write(checked, tmp_path / "checked.ipynb")
    done = shared_runs.python(
        "-m",
        "pytest",
        "--nbval-lax",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        "-v",
        tmp_path / "checked.ipynb",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(test_notebooks.CODE) + 1} passed" in done.stdout
    assert {name: (demo.out / name).read_bytes() for name in before} == before
    again = json.loads((demo.out / "result.json").read_text())
    for key in ("accuracy", "loss", "ledger", "curve", "privacy", "hyper_parameters"):
        assert again[key] == first[key], key


def test_in_a_bare_folder_it_goes_on_with_digits(tmp_path):
    """As somebody finds it who opens it without CIFAR-10 and a network: it trains on digits, and says so everywhere."""
    changes = dict(pair.split("=") for pair in shared_runs.SMALL)
    changes = {k: int(v) if v.isdigit() else v for k, v in changes.items()}
    outputs, text = shared_runs.execute(
        shared_runs.NOTEBOOK.name,
        tmp_path,
        bare=True,
        changes={**changes, "depth": 10, "width": 1, "augmult": 1},
    )
    assert not [o for o in outputs if o.output_type == "error"]
    assert "no network to https://" in text and "goes on with digits, which come with dpnb" in text
    assert "digits: 1500 training" in text and "This run is on **digits**" in text
    (record,) = (tmp_path / "runs" / "cifar10").rglob("result.json")
    made = json.loads(record.read_text())
    assert made["data"]["name"] == "digits" and made["paper"]["mean"] is None
    assert "dataset=digits" in record.parent.name


def test_a_run_with_a_place_of_its_own_has_its_data_or_fails(tmp_path):
    """Nothing else is trained where CIFAR-10 was asked for."""
    with pytest.raises(AssertionError, match="no network to https://"):
        shared_runs.execute(shared_runs.NOTEBOOK.name, tmp_path)
    assert not [*tmp_path.rglob("ledger.jsonl")]
