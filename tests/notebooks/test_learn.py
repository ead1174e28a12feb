"""The lectures: papermill executes each one, and its exercises check themselves; nbval runs one of them once more."""

import ast
import re

import nbformat
import pytest
import shared_runs
from answers import ANSWERS
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
    """Goals and time at the beginning, exercises with hidden solutions, an open task, references at the end."""
    cells = nbformat.read(FOLDER / name, 4).cells
    text = "\n".join(c.source for c in cells)
    assert "You will learn" in cells[0].source or "After this lecture you can" in cells[0].source
    assert "minutes" in cells[0].source and len(re.findall("[Ee]xercise", text)) >= 2
    assert "References" in cells[-1].source
    assert text.count("### Open task") == 1
    assert (
        'solutions = False  # @param {type:"boolean"}'
        in next(c for c in cells if c.cell_type == "code").source
    )
    solutions = [c for c in cells if "solution" in c.metadata.get("tags", ())]
    asked = [c for c in cells if "...  # yours here" in c.source]
    assert len(solutions) == len(ANSWERS[name]) == len(asked)
    for cell in solutions:
        assert cell.metadata["cellView"] == "form" and cell.metadata["jupyter"] == {"source_hidden": True}
        (guard,) = ast.parse(
            cell.source
        ).body  # nothing runs, and nothing is shown, but where they are asked for
        assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "solutions" and not guard.orelse


def unrepeatable(source: str) -> list[str]:
    """What in a cell gives another result each time: generators without a seed, clocks, the system's randomness."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNREPEATABLE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNREPEATABLE:
            found.append(f"from {node.module}")  # whose calls would not be seen below
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


ATTEMPT = """
print({kind!r}, "answer to exercise {number},", {answer!r}, end=": ")
{call}"""


def with_attempts(notebook, answers):
    """The lecture with a cell behind each check, which tries right and wrong answers."""
    for number, (right, wrong) in answers.items():
        assert len(right) >= 2 and len(wrong) >= 4
        calls = [re.fullmatch(rf'check\("\d\d\.{number}", (\w+)(.*)\)', c.source) for c in notebook.cells]
        ((place, call),) = [(i, call) for i, call in enumerate(calls) if call]
        tried = [("right", answer) for answer in right] + [("wrong", answer) for answer in wrong]
        source = "# attempts" + "".join(
            ATTEMPT.format(kind=k, number=number, answer=a, call=call[0].replace(call[1], f"({a})", 1))
            for k, a in tried
        )
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    return notebook


@pytest.mark.notebook
@pytest.mark.parametrize("name", NAMES)
def test_lecture(name, tmp_path):
    """From top to bottom with its solutions, in a bare folder; and what its checks say of other answers.

    One of them twice, the second time with nbval, in lax mode: what cells print that time nothing is the same both
    times. Only cells with text alone are compared, figures are not.
    """
    notebook = with_attempts(nbformat.read(FOLDER / name, 4), ANSWERS[name])
    nbformat.write(notebook, tmp_path / name)
    outputs, text = execute(tmp_path / name, tmp_path / "out", optimised=True, solutions=True)
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    judged = re.findall(
        r"^(right|wrong) answer to exercise (\d+), (.+?): (right|no answer yet|not yet)", text, re.M
    )
    assert len(judged) == sum(len(r) + len(w) for r, w in ANSWERS[name].values())
    assert not [x for x in judged if (x[0] == "right") != (x[3] == "right")]
    assert text.count("no answer yet") == len(ANSWERS[name])  # what a student sees first
    checked = nbformat.read(tmp_path / "out" / name, 4)
    solved = [c for c in checked.cells if "solution" in c.metadata.get("tags", ())]
    assert all(c.outputs[0].text.startswith("right") for c in solved)
    checked.cells = [c for c in checked.cells if not c.source.startswith("# attempts")]
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
    for cell in checked.cells:  # and without solutions nothing is said of them
        cell.source = cell.source.replace("solutions = True", "solutions = False")
        if "solution" in cell.metadata.get("tags", ()):
            cell.outputs = []
    nbformat.write(checked, tmp_path / "checked.ipynb")
    done = shared_runs.python(
        "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path / "checked.ipynb"
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
