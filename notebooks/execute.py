"""The lectures, and the notebooks that show runs on record, executed: results/notebooks/NAME.ipynb, with all figures.

    python notebooks/execute.py [NAME ...]

No study trains, and lectures are as students see them, without solutions.  A test says when one of them is older than
its notebook or the records.
"""

import base64
import io
import pathlib
import sys
import tempfile

import nbformat
import numpy as np
import papermill
from PIL import Image

from dpnb.commands.classes import without_solutions
from dpnb.commands.execution import QUIET
from dpnb.experiments import studies

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent / "results" / "notebooks"
NAMES = (
    "cifar10_table", *(name.removesuffix(".ipynb") for name in studies.STUDIES.values()), "cifar_finetune",
    "cifar_no_public_images", *(f"learn/{path.stem}" for path in sorted(HERE.glob("learn/*.ipynb"))),
)  # fmt: skip
KEPT = ("tags", "jupyter", "cellView")  # of the metadata of a cell


def execute(name: str) -> nbformat.NotebookNode:
    """The notebook with its outputs, at preset teach, without training and without a word of this machine."""
    path = HERE / f"{name}.ipynb"
    known = papermill.inspect_notebook(path)
    with tempfile.TemporaryDirectory() as empty:
        wanted = dict(preset="teach", train=False, output_dir=empty)
        given = {key: value for key, value in wanted.items() if key in known}
        done = papermill.execute_notebook(
            path, None, given, cwd=empty, progress_bar=False, kernel_name="python3", extra_arguments=QUIET
        )
    if name.startswith("learn/"):
        done = without_solutions(done)
    done.metadata.pop("papermill", None)
    done.metadata.language_info.pop("version", None)
    for cell in done.cells:
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.id = "injected-parameters"  # the same each time
            cell.source = "\n".join(line for line in cell.source.splitlines() if "output_dir" not in line)
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in KEPT}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    return done


def smaller(png: str) -> str:
    """The same picture in less than half of the bytes: of 256 colours where nobody sees the difference."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    apart = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(picture, int)).mean()
    made = io.BytesIO()
    (few if apart < 0.1 else picture).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def main(names: list[str]) -> None:
    for name in names or NAMES:
        out = OUT / f"{name}.ipynb"
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(execute(name), out)
        print(f"{out.relative_to(HERE.parent)}: {out.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
