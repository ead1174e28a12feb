"""Copies the notebooks, to open and change them."""

import os
import pathlib

from dpnb import folders
from dpnb.files import writable_folder, write_atomic


def copy_notebooks(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Copies all notebooks to a directory, in the folders they are in, and never over a file that is there.

    Returns:
      The copies that were made, and the files that were left alone.
    Raises:
      FileNotFoundError: this installation has no notebooks.
      OSError: a folder cannot be made or written.
      ValueError: a name in the path is too long for a file system.
    """
    names = [path.relative_to(folders.NOTEBOOKS) for path in sorted(folders.NOTEBOOKS.rglob("*.ipynb"))]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not names:
        raise FileNotFoundError(
            f"dpnb must come with notebooks, and {folders.NOTEBOOKS} has none; install dpnb again"
        )
    copied, left = [], []
    for folder in sorted({name.parent for name in names}):
        writable_folder(directory / folder)
    for name in names:
        there = os.path.lexists(directory / name)
        (left if there else copied).append(directory / name)
        if not there:
            write_atomic(directory / name, (folders.NOTEBOOKS / name).read_bytes())
    return copied, left
