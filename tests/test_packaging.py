"""What an installation needs, what it does not, and that no file names a machine it was written on."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from shared_runs import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_leaves_packages_to_pyproject_and_the_constraints():
    """Conda writes the part for pip to a file beside environment.yml, and calls pip there."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    extras = ",".join(PYPROJECT["optional-dependencies"])
    assert pip == ["--constraint constraints.txt", f"-e .[{extras}]"]
    assert f"python{PYPROJECT['requires-python']},<3.14" in conda
    assert (ROOT / "constraints.txt").is_file()


@pytest.mark.parametrize(
    "requirement", PYPROJECT["dependencies"] + sum(PYPROJECT["optional-dependencies"].values(), [])
)
def test_every_requirement_is_a_range(requirement):
    """A lower and an upper bound: releases keep working, and nothing breaks one by surprise."""
    assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+,<[0-9.]+", requirement)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_hold_a_version_in_range_of_every_requirement(python):
    """And one only, for each Python; what they need themselves is pinned with them."""
    from packaging.requirements import Requirement

    assert "3.11" in PYPROJECT["requires-python"]
    where = {"python_version": python, "python_full_version": f"{python}.5", "extra": ""}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line.split("#")[0]) if line.split("#")[0].strip() else None
        if pin and (pin.marker is None or pin.marker.evaluate(where)):
            assert pins.setdefault(pin.name, pin) is pin, f"{pin.name} is pinned twice for Python {python}"
            assert str(pin.specifier).startswith("=="), line
    asked = PYPROJECT["dependencies"] + sum(PYPROJECT["optional-dependencies"].values(), [])
    for wanted in map(Requirement, asked):
        (pinned,) = pins[wanted.name].specifier
        assert pinned.version in wanted.specifier, f"{wanted} has {pinned}; renew it: make constraints"
    assert {"jaxlib", "ml-dtypes", "tensorstore"} < pins.keys()


def test_every_installation_of_the_makefile_is_constrained():
    installs = re.findall(r"pip install .*", (ROOT / "Makefile").read_text())
    ours = [line for line in installs if "-e " in line]
    assert len(ours) == 4 and all("$(CONSTRAINTS)" in line for line in ours)


BLOCKED = (
    "tensorflow_datasets",
    "tensorflow",
    "papermill",
    "sklearn",
    "nbformat",
    "IPython",
    "dp_accounting",
)
# `plots` needs matplotlib, `notebook` is for notebooks alone.
SOURCES = sorted(
    p for p in (ROOT / "dpnb").rglob("*.py") if p.stem != "plots" and p.parent.name != "notebook"
)
MODULES = tuple(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES
)
IMPORT = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
for module in {MODULES}:
    importlib.import_module(module)
for blocked in {BLOCKED}:
    try:
        importlib.import_module(blocked)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{blocked}} was not blocked")
from dpnb import privacy
try:
    privacy.epsilon(privacy.Mechanism(1.0, 0.1), 1, 1e-5)
except privacy.MissingAccountant as error:
    print(error)
"""


def test_the_library_imports_without_the_optional_packages():
    """Every module but those for figures and notebooks; the accountant is missed where it is used, with what to install."""
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"dpnb", "dpnb.training", "dpnb.training.update", "dpnb.results", "dpnb.models.layers"} < set(
        MODULES
    )
    assert "pip install dp-accounting" in done.stdout


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert (cited["version"], cited["license"]) == (PYPROJECT["version"], PYPROJECT["license"])
    paper = cited["preferred-citation"]
    assert paper["title"] == (
        "Unlocking High-Accuracy Differentially Private Image Classification through Scale"
    )
    assert [a["family-names"] for a in paper["authors"]] == ["De", "Berrada", "Hayes", "Smith", "Balle"]
    assert paper["year"] == 2022 and paper["doi"] == "10.48550/arXiv.2204.13650"


def test_license_and_entry_point():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text
    assert PYPROJECT["scripts"] == {"dpnb": "dpnb.cli:main"}


def test_hooks_use_a_version_of_ruff_in_the_range():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (pinned,) = (repo["rev"] for repo in hooks if repo["repo"].endswith("/ruff-pre-commit"))
    (allowed,) = (r for r in PYPROJECT["optional-dependencies"]["test"] if r.startswith("ruff"))
    low, high = re.fullmatch(r"ruff>=([0-9.]+),<([0-9.]+)", allowed).groups()

    def number(version):
        return tuple(map(int, version.lstrip("v").split(".")))

    assert number(low) <= number(pinned) < number(high)


def test_make_targets():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", text, re.M))
    assert {"demo", "test", "test-fast", "lint", "lab"} <= targets
    options = re.findall(r"dpnb run (.*)", text)
    assert options
    from dpnb import cli

    for line in options:  # what `make demo` passes is what the command line takes
        asked = subprocess.run(
            [sys.executable, "-m", cli.__name__, "run", *line.split(), "--help"], capture_output=True, text=True,
            cwd=ROOT,
        )  # fmt: skip
        for flag in re.findall(r"--[\w-]+", line):
            assert flag in asked.stdout


def files():
    """Tracked files and new ones that git does not ignore; all files where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [p for p in paths if p.is_file()]


def test_no_file_names_a_machine_or_a_registry_host():
    """A clone works anywhere: no path of a machine, no shared folder, no package index."""
    hosts = ["pypi." + "org", "pythonhosted." + "org", "registry.npm" + "js", "conda.anaconda." + "org"]
    hosts += ["repo.anaconda." + "com", "download.pytorch." + "org"]
    pattern = re.compile("|".join([r"\.\./shar" + "ed", r"(?<![\w.])/wo" + r"rk/", *map(re.escape, hosts)]))
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if hit := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {hit[0]}")
    assert not found
    assert pattern.search("see ../shar" + "ed/x") and pattern.search("in '/wo" + "rk/x'")
    assert not pattern.search("my/wo" + "rk/x")


def test_continuous_integration_runs_the_test_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "must be executable"
    text = script.read_text()
    assert "make test" in text and "mktemp" in text
    subprocess.run(["bash", "-n", script], check=True)
