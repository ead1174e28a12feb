"""Dockerfile and Binder: what they name is there, and nothing goes into an image that git leaves out."""

import json
import os
import re
import shlex
import subprocess

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from shared_runs import ROOT
from test_packaging import PYPROJECT

KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, (word, rest of the line)."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def rests(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def targets() -> set[str]:
    """The targets of the Makefile, by their default names."""
    text = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    return set(re.findall(r"^([\w./-]+):(?!=)", text, re.M))


def made(command: list[str]) -> list[str]:
    """What a command asks `make` for."""
    assert command[0] == "make"
    return [word for word in command[1:] if "=" not in word]


def supported(version: str) -> bool:
    """Is it a Python that pyproject.toml and environment.yml allow?"""
    (conda,) = re.findall(r"- python(\S+)", (ROOT / "environment.yml").read_text())
    return all(Version(version) in SpecifierSet(s) for s in (PYPROJECT["requires-python"], conda))


def test_the_dockerfile_is_well_formed():
    words = [word for word, _ in instructions()]
    assert set(words) <= KNOWN
    assert words[0] == "FROM" and words[-1] == "CMD" and words.count("FROM") == words.count("CMD") == 1
    assert supported(re.fullmatch(r"python:(\d\.\d+)-slim", rests("FROM")[0])[1])


def test_the_image_is_built_and_started_by_targets_of_the_makefile():
    """As the user that owns the tree, and JupyterLab can be reached at the port that is named."""
    (user,), (home,), (copy,) = rests("USER"), rests("WORKDIR"), rests("COPY")
    assert f"useradd --create-home {user}" in rests("RUN")[1] and home == f"/home/{user}"
    assert copy == f"--chown={user} . ."
    words = [word for word, _ in instructions()]
    assert words.index("COPY") < words.index("USER") < len(words) - words[::-1].index("RUN") - 1
    command = json.loads(rests("CMD")[0])
    build, folder = rests("RUN")[-1].split(" && ")
    assert folder == "mkdir runs"  # a volume that is mounted there belongs to the user, as it does
    asked = made(shlex.split(build)) + made(command)
    assert asked == [".venv/.lab", ".venv/.test", "lab"] and set(asked) <= targets()
    assert rests("ENV") == [f"PATH={home}/.venv/bin:$PATH"] and rests("EXPOSE") == ["8888"]
    # As in a container: without what a `make` around this test would pass on.
    passed_on = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VENV", "PYTHON", "LAB_OPTIONS"}
    plan = subprocess.run(
        [*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name not in passed_on},
    )  # fmt: skip
    assert plan.stdout.splitlines()[-1] == ".venv/bin/jupyter lab --ip=0.0.0.0 --no-browser notebooks"


def test_system_packages_are_those_that_make_and_the_tests_need():
    (names,) = re.findall(r"install --yes --no-install-recommends ([\w ]+) &&", rests("RUN")[0])
    assert names.split() == ["git", "make"]


def test_what_git_leaves_out_stays_out_of_the_image():
    """Line by line: a name without a slash is one anywhere, which Docker says with **/."""

    def docker(pattern: str) -> str:
        anchored = pattern.startswith("/")
        return pattern.strip("/") if anchored else f"**/{pattern.rstrip('/')}"

    ignored = (ROOT / ".gitignore").read_text().split()
    out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert sorted(out) == sorted([".git", *map(docker, ignored)])
    assert {"runs", "data", "**/private", "**/seed.secret", "**/.venv*"} < set(out)


def test_binder():
    """Binder calls pip at the root; pip looks for constraints beside the file that names them."""
    folder = ROOT / "binder"
    assert {path.name for path in folder.iterdir()} == {"requirements.txt", "runtime.txt"}
    constraint, package = [
        line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert (folder / constraint.removeprefix("--constraint ")).resolve() == ROOT / "constraints.txt"
    assert package == "-e .[lab]" and "lab" in PYPROJECT["optional-dependencies"]
    assert supported((folder / "runtime.txt").read_text().strip().removeprefix("python-"))


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_other_pythons_are_not_supported(version):
    assert not supported(version)
