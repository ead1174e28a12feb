"""The lectures: papermill executes each one, its exercises check themselves, and nbval runs it once more."""

import re

import nbformat
import pytest
import shared_runs
from shared_runs import execute

FOLDER = shared_runs.NOTEBOOK.parent / "learn"
NAMES = [path.name for path in sorted(FOLDER.glob("*.ipynb"))]
SHAKY = {"nbval-ignore-output", "injected-parameters"}


def test_the_six_lectures():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """Goals and time at the beginning, exercises, references at the end."""
    cells = nbformat.read(FOLDER / name, 4).cells
    text = "\n".join(c.source for c in cells)
    assert "You will learn" in cells[0].source or "After this lecture you can" in cells[0].source
    assert "minutes" in cells[0].source and len(re.findall("[Ee]xercise", text)) >= 2
    assert "References" in cells[-1].source


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_lecture(name, tmp_path):
    """From top to bottom twice; what is printed by cells that time nothing is the same both times.

    The second time with nbval, in lax mode: only cells with text alone are compared, figures are not.
    """
    outputs, text = execute(f"learn/{name}", tmp_path)
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert text.count("right") >= 2 and "not yet" not in text
    checked = nbformat.read(tmp_path / name, 4)
    compared = 0
    for cell in checked.cells:
        shown = cell.get("outputs", ())
        plain = shown and all(o.output_type == "stream" and o.name == "stdout" for o in shown)
        if plain and not SHAKY & set(cell.metadata.get("tags", ())):
            cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "nbval-check-output"]
            compared += 1
    assert compared >= 3
    nbformat.write(checked, tmp_path / "checked.ipynb")
    done = shared_runs.python(
        "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path / "checked.ipynb"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
