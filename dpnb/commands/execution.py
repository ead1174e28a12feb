"""Executes a notebook with papermill: its output is shown as it comes, and a failed one is kept as far as it got."""

import os
import pathlib
import sys
from typing import Any

# ipykernel 7 warns at each start that its messages are not encrypted; they do not leave the machine.
QUIET = ["--IPKernelApp.log_level=40"]


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died; `unfinished` is the notebook up to there."""

    def __init__(self, why: str, unfinished: pathlib.Path):
        super().__init__(why)
        self.unfinished = unfinished


def known_parameters(notebook: pathlib.Path) -> set[str]:
    """Returns the names that the `parameters` cell of a notebook gives values to."""
    import papermill

    return set(papermill.inspect_notebook(_braced(notebook)))


def execute(
    notebook: pathlib.Path, parameters: dict[str, Any], out: pathlib.Path, kept: pathlib.Path
) -> pathlib.Path:
    """Executes a notebook in the folder `out`.

    Args:
      notebook: its file.
      parameters: values for names of its `parameters` cell.
      out: where its cells run.
      kept: the folder for the executed notebook. It replaces an earlier one only when it has ended well.
    Returns:
      The path of the executed notebook.
    Raises:
      NotebookFailed: a cell raised, or the kernel died.
    """
    import papermill

    os.environ.setdefault("DPNB_PROGRESS", "plain")
    executed, unfinished = kept / notebook.name, kept / f"unfinished-{notebook.name}"
    try:
        papermill.execute_notebook(
            _braced(notebook), _braced(unfinished), parameters, cwd=out, log_output=False, progress_bar=False,
            stdout_file=sys.stdout, stderr_file=sys.stderr, kernel_name="python3", extra_arguments=QUIET,
        )  # fmt: skip
    except (papermill.PapermillExecutionError, RuntimeError) as error:  # a cell's error, or the kernel died
        why = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error)
        raise NotebookFailed(why, unfinished) from error
    unfinished.replace(executed)
    return executed


def _braced(path: pathlib.Path) -> str:
    """Returns a path as papermill takes it, which formats it with the parameters: braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")
