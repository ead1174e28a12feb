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


FOLDER = shared_runs.NOTEBOOK.parent
ALL = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.ipynb"))}
everyone = pytest.mark.parametrize("path", ALL.values(), ids=ALL)


@everyone
def test_format(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5
    # As they stand in the file: nbformat would make up ids that are missing.
    ids = [cell.get("id") for cell in json.loads(path.read_text())["cells"]]
    assert len(set(ids)) == len(ids) and all(ids)


@everyone
def test_nothing_executed_is_committed(path):
    notebook = nbformat.read(path, 4)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert not {"execution", "papermill", "ExecuteTime"} & set(cell.metadata)
    assert not tagged("injected-parameters", notebook)


@everyone
def test_every_code_cell_compiles(path):
    """As plain Python: no magics, so that papermill, nbconvert and Colab run the same code."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            compile(cell.source, cell.id, "exec")
            assert not re.search(r"^\s*[%!]", cell.source, re.M)


@everyone
def test_every_notebook_has_its_badge_set_up_and_parameters(path):
    """The badge names this very file; the set-up cell is the same everywhere; parameters come first."""
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "colab-badge.svg" in notebook.cells[0].source
    assert f"/blob/main/notebooks/{path.relative_to(FOLDER)})" in notebook.cells[0].source
    (parameters,), (setup,) = tagged("parameters", notebook), tagged("colab", notebook)
    assert parameters is code[0] and assignments(parameters.source)
    assert all("# @param" in line for line in parameters.source.splitlines() if line.strip())
    assert setup.source == tagged("colab")[0].source
    assert "2204.13650" in notebook.cells[-1].source


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
        assert source == str(shared_runs.NOTEBOOK)
        raise Passed(given)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(Passed) as passed:
        cli.main(["run", "digits/wrn-10-1", f"--out={tmp_path}", "--set", "steps=3"])
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


@pytest.mark.parametrize(
    "output_dir, mounted", [("/content/drive/MyDrive/dpnb", 1), ("", 0), ("runs", 0), (None, 0)]
)
def test_colab_set_up_mounts_the_drive_where_runs_go_there(output_dir, mounted, monkeypatch):
    """With dpnb installed already; None: a notebook without runs."""
    drive, mounts = types.ModuleType("google.colab.drive"), []
    drive.mount = mounts.append
    colab = types.ModuleType("google.colab")
    colab.drive = drive
    for name, module in (("google", types.ModuleType("google")), ("google.colab", colab)):
        monkeypatch.setitem(sys.modules, name, module)
    (setup,) = tagged("colab")
    exec(setup.source, {} if output_dir is None else {"output_dir": output_dir})
    assert mounts == ["/content/drive"] * mounted


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


LINK = re.compile(r"\]\(((?!https?:)[^)#]+\.ipynb)\)")
ON_COLAB = "https://colab.research.google.com/github/dpnb/dpnb/blob/main/notebooks/"


def prose(path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")


@everyone
def test_links_to_other_notebooks_lead_there(path):
    """Relative ones for JupyterLab and GitHub, and beside each, at the end, one for Colab, where relative ones lead nowhere."""
    linked = {(path.parent / target).resolve() for target in LINK.findall(prose(path))}
    assert linked and all(target.is_file() for target in linked)
    last = nbformat.read(path, 4).cells[-1].source
    for target in linked:
        assert f"({ON_COLAB}{target.relative_to(FOLDER)})" in last
    assert not re.findall(r"`[^`]*\.ipynb`", prose(path)), "names of notebooks are links"


def test_there_are_many_links():
    assert sum(len(LINK.findall(prose(path))) for path in ALL.values()) >= 25
    lectures = [path for name, path in ALL.items() if name.startswith("learn/")]
    for before, after in zip(lectures, lectures[1:], strict=False):
        assert f"Next: [lecture {after.name[:2]}" in prose(before)


@everyone
def test_every_reference_has_a_link(path):
    references = nbformat.read(path, 4).cells[-1].source.split("References:")[1].split("\n---\n")[0]
    for reference in re.split(r"\. (?=[A-Z])", " ".join(references.split())):
        assert "](http" in reference or reference.startswith("Other sources: the table above"), reference


@everyone
def test_set_up_is_folded(path):
    """So that a notebook begins with its subject."""
    (setup,) = tagged("colab", nbformat.read(path, 4))
    assert setup.source.startswith("# @title ")
    assert setup.metadata["cellView"] == "form" and setup.metadata["jupyter"] == {"source_hidden": True}


def test_every_lecture_begins_with_its_subject():
    """Parameters, a folded set-up, folded imports; then words."""
    for name, path in ALL.items():
        if name.startswith("learn/"):
            title, parameters, note, setup, imports, *rest = nbformat.read(path, 4).cells
            assert [c.cell_type for c in (title, parameters, note)] == ["markdown", "code", "markdown"], name
            assert "notebook.lecture_style()" in imports.source
            until = next(i for i, c in enumerate(rest) if c.cell_type == "markdown")
            for cell in (setup, imports, *rest[:until]):
                assert cell.metadata["jupyter"] == {"source_hidden": True}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stepz": 3}, "no hyper-parameter 'stepz'; did you mean steps?"),
        ({"seed": 3}, "changes must leave seed alone, got 3; it is the parameter `seed`"),
        ([3], "changes must be a dictionary"),
        ("steps", "changes must be a dictionary"),
    ],
)
def test_bad_changes_are_refused_in_a_line(changes, said):
    """By the notebook's own first cell, as on the command line."""
    (cell,) = [c for c in CODE if "read_changes" in c.source]
    with pytest.raises(ValueError, match=re.escape(said)):
        exec(cell.source, {**assignments(CODE[0].source), "changes": changes})


@everyone
def test_changes_are_read_wherever_they_are_a_parameter(path):
    notebook = nbformat.read(path, 4)
    (parameters,) = tagged("parameters", notebook)
    asks = "changes = " in parameters.source
    assert asks == any("experiments.read_changes(changes)" in cell.source for cell in notebook.cells)
