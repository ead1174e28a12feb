"""The notebooks that show runs on record, executed: results/notebooks/NAME.ipynb, with all tables and figures.

    python notebooks/execute.py [NAME ...]

Nothing is trained.  A test says when one of them is older than its notebook or the records.
"""

import pathlib
import sys
import tempfile

import nbformat
import papermill

from dpnb.experiments import studies

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent / "results" / "notebooks"
NAMES = (
    "cifar10_table", *(name.removesuffix(".ipynb") for name in studies.STUDIES.values()), "cifar_finetune",
    "cifar_no_public_images", "learn/06_reading_the_paper",
)  # fmt: skip


def execute(name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs, at preset teach, without training and without a word of this machine."""
    path = HERE / f"{name}.ipynb"
    known = papermill.inspect_notebook(path)
    with tempfile.TemporaryDirectory() as empty:
        wanted = dict(preset="teach", train=False, output_dir=empty)
        given = {key: value for key, value in wanted.items() if key in known}
        done = papermill.execute_notebook(
            path, None, given, cwd=empty, progress_bar=False, kernel_name="python3"
        )
    done.metadata.pop("papermill", None)
    done.metadata.language_info.pop("version", None)
    for cell in done.cells:
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.id = "injected-parameters"  # the same each time
            cell.source = "\n".join(line for line in cell.source.splitlines() if "output_dir" not in line)
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return done


def main(names: list[str]) -> None:
    for name in names or NAMES:
        out = OUT / f"{name}.ipynb"
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(execute(name), out)
        print(f"{out.relative_to(HERE.parent)}: {out.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
