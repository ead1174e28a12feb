"""Copies of the notebooks for a class: the lectures without their solutions for students, and with them for whoever teaches."""

import copy
import pathlib
import re
from typing import TYPE_CHECKING

from dpnb.commands.copying import copy_notebooks
from dpnb.files import write_atomic

if TYPE_CHECKING:
    from nbformat import NotebookNode

STUDENTS, ANSWERS = "students", "answers"
PARAMETER = "solutions = "
ON_COLAB = re.compile(r"\[!\[Open In Colab\][^\n]*\n\n| \(\[on Colab\]\([^)]*\)\)")
# The sentence of a lecture that says where its solutions are.
HIDDEN = " Solutions stay hidden unless you set `solutions = True` and run on."


def without_solutions(notebook: "NotebookNode") -> "NotebookNode":
    """Returns a lecture without the cells that are tagged `solution`, and without the parameter that shows them."""
    made = copy.deepcopy(notebook)
    made.cells = [cell for cell in made.cells if "solution" not in cell.metadata.get("tags", ())]
    for cell in made.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            lines = [line for line in cell.source.splitlines() if not line.startswith(PARAMETER)]
            cell.source = "\n".join(lines)
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(HIDDEN, "")
    return made


def for_students(notebook: "NotebookNode") -> "NotebookNode":
    """Returns a lecture without its solutions, and without links to Colab, where it has them."""
    made = without_solutions(notebook)
    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = ON_COLAB.sub("", cell.source)
    return made


def with_answers(notebook: "NotebookNode") -> "NotebookNode":
    """Returns a lecture with its solutions unfolded, to be shown when it runs."""
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        tags = cell.metadata.get("tags", ())
        if "parameters" in tags:
            cell.source = cell.source.replace(f"{PARAMETER}False", f"{PARAMETER}True")
        if "solution" in tags:
            cell.metadata = {"tags": list(tags)}
    return made


def copy_for_class(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Copies all notebooks twice, to `students/` and `answers/`, and never over a file that is there.

    Returns:
      The copies that were made, and the files that were left alone.
    Raises:
      FileNotFoundError, OSError, ValueError: as `copy_notebooks` does.
    """
    import nbformat

    copied, left = [], []
    for folder, change in ((STUDENTS, for_students), (ANSWERS, with_answers)):
        made, old = copy_notebooks(directory / folder)
        for path in made:
            if path.parent.name == "learn":
                changed = nbformat.writes(change(nbformat.read(path, 4)))
                write_atomic(path, changed + "\n")
        copied, left = copied + made, left + old
    return copied, left
