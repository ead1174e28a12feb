"""The lectures: papermill executes each one, and its exercises check themselves; nbval runs one of them once more."""

import ast
import re

import nbformat
import pytest
import shared_runs
from shared_runs import execute
from test_notebooks import ALL

FOLDER = shared_runs.NOTEBOOK.parent / "learn"
NAMES = [path.name for path in sorted(FOLDER.glob("*.ipynb"))]
SHAKY = {"nbval-ignore-output", "injected-parameters"}
AGAIN = "06_reading_the_paper.ipynb"
UNSEEDED = {"default_rng", "RandomState", "SeedSequence", "Generator", "PCG64", "Random"}
UNREPEATABLE = {"random", "secrets", "uuid", "time", "datetime"}  # modules


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


def unrepeatable(source: str) -> list[str]:
    """What in a cell gives another result each time: generators without a seed, clocks, the system's randomness."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNREPEATABLE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNREPEATABLE:
            found.append(node.module)
        elif isinstance(node, ast.Call) and text.split("(")[0].split(".")[-1] in UNSEEDED:
            found += [text] * (not node.args and not node.keywords)
        elif re.fullmatch(
            r"os\.urandom|(np|numpy)\.random\.(?!default_rng|RandomState|SeedSequence|Generator)\w+", text
        ):
            found.append(text)
    return found


@pytest.mark.parametrize("path", ALL.values(), ids=ALL)
def test_what_is_printed_rests_on_nothing_unrepeatable(path):
    """No generator without a seed and no clock, but in cells whose output is marked as different each time."""
    timed = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            found = unrepeatable(cell.source)
            timed += [name for name in found if name == "time"]
            assert set(found) <= {"time"}, cell.source
            if re.search(r"\btime\.\w+\(", cell.source):
                assert timed and SHAKY & set(cell.metadata.get("tags", ())), cell.source


@pytest.mark.parametrize(
    "source",
    ["r = np.random.default_rng()", "np.random.normal(3)", "import random", "from secrets import randbits",
     "os.urandom(8)", "x = np.random.RandomState().rand()", "import time"],
)  # fmt: skip
def test_what_is_unrepeatable_is_seen(source):
    assert unrepeatable(source)
    assert not unrepeatable("r = np.random.default_rng(0); r.normal(3); jax.random.key(1)")


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_lecture(name, tmp_path):
    """From top to bottom; one of them twice, and what cells print that time nothing is the same both times.

    The second time with nbval, in lax mode: only cells with text alone are compared, figures are not.
    """
    outputs, text = execute(f"learn/{name}", tmp_path, optimised=True)
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
    if name != AGAIN:
        return
    nbformat.write(checked, tmp_path / "checked.ipynb")
    done = shared_runs.python(
        "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path / "checked.ipynb"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
