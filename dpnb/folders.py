"""What comes with the code: notebooks, records on file with public weights, and the versions it is tested with.

In a source checkout they lie beside the package, in an installed package inside it.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import tomllib

from dpnb.files import writable_folder, write_atomic

_PACKAGE = pathlib.Path(__file__).parent
INSTALLED = (_PACKAGE / "share").is_dir()  # from a wheel, and not a checkout
ROOT = _PACKAGE / "share" if INSTALLED else _PACKAGE.parent
NOTEBOOKS = ROOT / "notebooks"
RECORDS = ROOT / "results"
CONSTRAINTS = ROOT / "constraints.txt"
# Where notebooks put their runs: never into an installed package.
RUNS = pathlib.Path("runs") if INSTALLED else ROOT / "runs"


def version() -> str:
    """Returns the version of dpnb: that of pyproject.toml in a checkout, else of the installed package."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # no checkout
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        if project["name"] == "dpnb":
            return project["version"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("dpnb")
    return "of unknown version"  # its folder was copied by hand


def records() -> pathlib.Path:
    """Returns the folder `results` of the working directory if there is one, else that of the records on file."""
    return pathlib.Path("results") if os.path.isdir("results") else RECORDS


def is_installed(path: pathlib.Path) -> bool:
    """Returns whether a path lies among what an installed package brought along."""
    return INSTALLED and ROOT.resolve() in path.resolve().parents


def copy_notebooks(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Copies all notebooks to a directory, in the folders they are in, and never over a file that is there.

    Returns:
      The copies that were made, and the files that were left alone.
    Raises:
      FileNotFoundError: this installation has no notebooks.
      OSError: a folder cannot be made or written.
      ValueError: a name in the path is too long for a file system.
    """
    names = [path.relative_to(NOTEBOOKS) for path in sorted(NOTEBOOKS.rglob("*.ipynb"))]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise FileNotFoundError(f"dpnb must come with notebooks, and {NOTEBOOKS} has none; install it again")
    copied, left = [], []
    for folder in sorted({name.parent for name in names}):
        writable_folder(directory / folder)
    for name in names:
        there = os.path.lexists(directory / name)
        (left if there else copied).append(directory / name)
        if not there:
            write_atomic(directory / name, (NOTEBOOKS / name).read_bytes())
    return copied, left
