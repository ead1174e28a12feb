"""The plan of the house: which room may import from which, no circle among files, and what an import costs."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

import dpnb

PACKAGE = pathlib.Path(dpnb.__file__).parent
# From the ground up. An import, lazy ones included, runs from a later room to an earlier one or stays inside;
# rooms on one floor do not see each other.
FLOORS = (
    ("lazy", "files", "folders"),
    ("cache",),
    ("privacy",),
    ("gradients", "data"),
    ("models",),
    ("experiments",),
    ("training",),
    ("results",),
    ("audit", "plots", "sweep", "commands"),
    ("notebook",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PACKAGES = (
    "privacy", "gradients", "data", "models", "models.weights", "experiments", "training", "results", "notebook",
)  # fmt: skip


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, source: str) -> set[str]:
    """The modules of dpnb that a file imports anywhere, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} must import by full names, got a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        # Tables of what is loaded on demand name modules in strings.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FILES:
            found.add(node.value)
    return {module for module in found if module in FILES} - {name}


def room(module: str) -> str:
    return module.split(".")[1]


IMPORTS = {name: imported(name, path.read_text()) for name, path in FILES.items()}


def against_the_order(imports: dict[str, set[str]]) -> list[str]:
    """Every import that does not run to a lower floor or stay in its room."""
    wrong = []
    for name, modules in imports.items():
        for module in modules if name != "dpnb" else ():  # the front door opens to all rooms
            if module != "dpnb" and room(name) != room(module) and FLOOR[room(name)] <= FLOOR[room(module)]:
                wrong.append(f"{name} imports {module}")
    return wrong


def test_imports_run_downwards():
    assert {room(name) for name in FILES if name != "dpnb"} == FLOOR.keys(), "a new room needs a floor"
    assert not against_the_order(IMPORTS)


@pytest.mark.parametrize(
    "source",
    [
        "from dpnb import training",
        "import dpnb.training.loop",
        "def f():\n    from dpnb.training.loop import train",
        "if TYPE_CHECKING:\n    from dpnb.experiments import Experiment",
        "HOMES = {'train': 'dpnb.training'}",
        "from dpnb.data import Dataset",
    ],
)
def test_an_import_against_the_order_is_seen(source):
    assert against_the_order({"dpnb.gradients.clipping": imported("dpnb.gradients.clipping", source)})


def test_no_circle_among_files():
    """`graphlib` names the files of a circle. (`dpnb/__init__` is imported by all, and names all.)"""
    graph = {name: modules - {"dpnb"} for name, modules in IMPORTS.items() if name != "dpnb"}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(FILES) - 1


def test_gradients_stand_alone():
    """They use nothing but two bounds on clip norms."""
    rooms = {room(m) for n, modules in IMPORTS.items() if n.startswith("dpnb.gradients") for m in modules}
    assert rooms == {"gradients", "privacy"}


def test_few_files_lie_outside_the_rooms():
    assert len([*PACKAGE.glob("*.py")]) <= 10


def test_the_loop_fits_on_a_screen():
    (train,) = [
        node
        for node in ast.parse(FILES["dpnb.training.loop"].read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    words = train.body[0]
    assert train.end_lineno - train.lineno - (words.end_lineno - words.lineno) <= 70


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_what_a_package_exports_is_there(package):
    module = importlib.import_module(f"dpnb.{package}".rstrip("."))
    assert module.__doc__ and list(module.__all__) == sorted(module.__all__, key=constants_first)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def constants_first(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_the_front_door_has_ten_to_sixteen_names():
    assert 10 <= len(dpnb.__all__) <= 16


HEAVY = (
    "jax",
    "flax",
    "tensorflow_datasets",
    "papermill",
    "IPython",
    "dp_accounting",
    "pandas",
    "matplotlib",
)
CHEAP = ("dpnb", "dpnb.cli", "dpnb.privacy", "dpnb.data", "dpnb.models", "dpnb.experiments", "dpnb.results")


@pytest.mark.parametrize("module", CHEAP)
def test_importing_is_cheap(module):
    """What reads tables, records and data sets does not wait for JAX; nothing waits for TFDS or Jupyter."""
    code = f"import sys, {module}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def shadowed(name: str) -> list[str]:
    """Functions that bind the name of a module that their file imports: a call in them meets the wrong thing."""
    tree = ast.parse(FILES[name].read_text())
    modules = {m.split(".")[-1] for m in IMPORTS[name]} & {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for f in ast.walk(tree):
        if isinstance(f, ast.FunctionDef):
            bound = {a.arg for a in (*f.args.args, *f.args.kwonlyargs)}
            bound |= {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            found += [f"{f.name} binds {x}" for x in sorted(bound & modules)]
    return found


@pytest.mark.parametrize("name", FILES)
def test_no_local_name_hides_a_module(name):
    assert not shadowed(name)


def undocumented(source: str) -> list[str]:
    """Public functions, methods and classes of a file that have no docstring; overrides of Python's own need none."""
    found = []

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                if ast.get_docstring(child) is None:
                    found.append(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(source), "")
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_public_name_is_documented(name):
    source = FILES[name].read_text()
    assert not undocumented(source) and ast.get_docstring(ast.parse(source))


def test_a_missing_docstring_is_seen():
    assert undocumented("class A:\n    'A.'\n    def f(self): pass\n    def _g(self): pass") == ["A.f"]
