"""Where notebooks, records, public weights and pinned versions lie: beside the package in a checkout, else inside it."""

import contextlib
import importlib.metadata
import os
import pathlib
import tomllib

_PACKAGE = pathlib.Path(__file__).parent
INSTALLED = (_PACKAGE / "share").is_dir()  # from a wheel, and not a checkout
ROOT = _PACKAGE / "share" if INSTALLED else _PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
RECORDS = ROOT / "results"
CONSTRAINTS = ROOT / "constraints.txt"


def version() -> str:
    """Returns the version of dpnb: that of pyproject.toml in a checkout, else of the installed package."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # no checkout
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        if project["name"] == "dpnb":
            return project["version"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("dpnb")
    return "of unknown version"  # its folder was copied by hand


def runs() -> pathlib.Path:
    """Returns where runs go unless something else is asked for, in a notebook and by a command: one place for both.

    It is `runs` in the checkout that dpnb is imported from, if the working directory lies in it, else `runs` in the
    working directory: never in an installed package.
    """
    here = pathlib.Path.cwd()
    inside = not INSTALLED and here.is_relative_to(ROOT)
    return ROOT / "runs" if inside and here != ROOT else pathlib.Path("runs")


def records() -> pathlib.Path:
    """Returns the folder `results` of the working directory if there is one, else that of the records on file."""
    return pathlib.Path("results") if os.path.isdir("results") else RECORDS


def is_installed(path: pathlib.Path) -> bool:
    """Returns whether a path lies among what an installed package brought along."""
    return INSTALLED and ROOT.resolve() in path.resolve().parents
