"""The notebook: its form, its parameters, one execution as a whole and one more that checks outputs."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import types

import nbformat
import pytest
import shared_runs

NOTEBOOK = nbformat.read(shared_runs.NOTEBOOK, 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def tagged(tag, notebook=NOTEBOOK):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def assignments(source) -> dict:
    """{name: value}; raises where a statement is anything but a literal given to a name."""
    made = {}
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        (target,) = statement.targets
        made[target.id] = ast.literal_eval(statement.value)
    return made


def test_format():
    nbformat.validate(NOTEBOOK)
    assert NOTEBOOK.nbformat == 4 and NOTEBOOK.nbformat_minor >= 5
    ids = [cell.id for cell in json_cells()]
    assert len(set(ids)) == len(ids) and all(ids)


def json_cells():
    """Cells as they stand in the file: nbformat would make up ids that are missing."""
    raw = json.loads(shared_runs.NOTEBOOK.read_text())
    return [nbformat.NotebookNode(cell) for cell in raw["cells"]]


def test_nothing_executed_is_committed():
    assert "widgets" not in NOTEBOOK.metadata
    for cell in CODE:
        assert cell.outputs == [] and cell.execution_count is None
        assert not {"execution", "papermill", "ExecuteTime"} & set(cell.metadata)
    assert not tagged("injected-parameters")


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell.id)
def test_every_code_cell_compiles(cell):
    """As plain Python: no magics, so that papermill, nbconvert and Colab run the same code."""
    compile(cell.source, cell.id, "exec")
    assert not re.search(r"^\s*[%!]", cell.source, re.M)


def test_parameters_are_literals_and_those_that_the_command_line_passes(monkeypatch, tmp_path):
    (cell,) = tagged("parameters")
    parameters = assignments(cell.source)
    assert cell is CODE[0]
    assert all("# @param" in line for line in cell.source.splitlines() if line.strip())
    import papermill

    from dpnb import cli

    class Passed(Exception):
        pass

    def execute(source, executed, given, **options):
        assert source == shared_runs.NOTEBOOK
        raise Passed(given)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(Passed) as passed:
        cli.main(["run", "digits/demo", f"--out={tmp_path}", "--set", "steps=3"])
    (given,) = passed.value.args
    assert set(given) == set(parameters)
    assert given["changes"] == {"steps": 3} and given["output_dir"] == str(tmp_path)
    for name, value in given.items():  # and of the same types, so that the defaults document them
        assert type(value) is type(parameters[name]), name


def test_default_parameters_are_an_experiment():
    from dpnb import experiments

    (cell,) = tagged("parameters")
    given = assignments(cell.source)
    experiments.get(given["experiment"], given["preset"], seed=given["seed"], **given["changes"])
    choices = re.search(r"preset = .*@param (\[.*\])", cell.source)[1]
    assert tuple(ast.literal_eval(choices)) == experiments.PRESETS


def test_colab():
    badge = NOTEBOOK.cells[0]
    assert (
        badge.cell_type == "markdown" and "colab.research.google.com/assets/colab-badge.svg" in badge.source
    )
    assert f"/blob/main/notebooks/{shared_runs.NOTEBOOK.name})" in badge.source
    (setup,) = tagged("colab")
    assert NOTEBOOK.cells.index(setup) < 8 and "google.colab" in setup.source


def test_colab_set_up_keeps_the_jax_that_is_there(monkeypatch):
    """Run as on a Colab machine: jax, jaxlib and numpy are at most pinned to what is installed already."""
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (setup,) = tagged("colab")
    exec(setup.source, {})
    installs = [command for command in calls if "install" in command]
    words = [word for command in installs for word in command]
    assert "flax" in words and any("dpnb" in word for word in words)
    for word in words:
        if (name := re.split(r"[<>=\[]", word)[0]) in ("jax", "jaxlib", "numpy"):
            assert word == f"{name}=={importlib.metadata.version(name)}"
    for command in installs:  # dpnb itself brings none along
        assert "--no-deps" in command or not any("dpnb" in word for word in command)
        assert not {"-U", "--upgrade", "--force-reinstall"} & set(command)


def test_colab_set_up_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it installed something"))
    (setup,) = tagged("colab")
    exec(setup.source, {})


def test_privacy_statement_is_the_last_that_is_computed():
    assert "results.statement(" in CODE[-1].source and "display(" in CODE[-1].source
    heading = [c.source for c in NOTEBOOK.cells if c.cell_type == "markdown" and c.source.startswith("## ")][
        -2
    ]
    assert "privacy statement" in heading


def test_story():
    """What a reader is promised, in this order."""
    text = "\n".join(cell.source for cell in NOTEBOOK.cells)
    order = ["differential privacy", "## Parameters", "@param", "\\mathrm{clip}", "plots.views", "plots.budget",
             "cost.predict", "training.train", "plots.curve", "plots.confusion", "results.table",
             "results.statement", "2204.13650"]  # fmt: skip
    position = 0
    for item in order:
        position = text.find(item, position)
        assert position >= 0, item
