"""Encoded images on disk by number: a folder per class, or one split of a TFDS data set."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import warnings
from typing import Protocol

import numpy as np

from dpnb.data.tfds import tfds_or_error
from dpnb.files import write_atomic

HASHES = "dpnb/hashes"  # below the user's cache directory: hashes of files, by size and time of change
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = -1  # the label of an image that could not be read; its gradient is zero


class Source(Protocol):
    """Encoded images by number; `files` are all the files that their content comes from."""

    files: list[pathlib.Path]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        """Returns (encoded image, label, name)."""


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images ROOT/CLASS/IMAGE; classes may be absent.

    Their order is fixed and mixes the classes, so the first or the last photographs contain all of them.
    """

    root: pathlib.Path
    classes: tuple[str, ...]

    @functools.cached_property
    def listed(self) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
        """(photographs in that order, all other files in the classes' folders that are not hidden)."""
        photographs, others = [], []
        for folder in (self.root / name for name in self.classes):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.suffix.lower() in SUFFIXES:
                    photographs.append(path)
                elif path.name[0] != ".":
                    others.append(path)
        photographs.sort(key=lambda p: hashlib.sha256(f"{p.parent.name}/{p.name}".encode()).digest())
        return photographs, others

    @property
    def files(self) -> list[pathlib.Path]:
        """The photographs, in order."""
        return self.listed[0]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        path = self.files[index]
        return path.read_bytes(), self.classes.index(path.parent.name), f"{path.parent.name}/{path.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """One split of a prepared TFDS data set, with its images left encoded."""

    directory: str
    split: str

    @functools.cached_property
    def source(self):
        """TFDS's data source of the split, opened at first use."""
        tfds = tfds_or_error()
        builder = tfds.builder_from_directory(self.directory)
        return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})

    @functools.cached_property
    def files(self) -> list[pathlib.Path]:
        """The files of the split, sorted by name."""
        return sorted(p for p in pathlib.Path(self.directory).glob(f"*-{self.split}.*") if p.is_file())

    def __reduce__(self):  # worker processes open it anew
        return type(self), (self.directory, self.split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        row = self.source[index]
        name = row.get("file_name", b"")
        return row["image"], int(row["label"]), name.decode() if isinstance(name, bytes) else str(name)


def decode(encoded: bytes, size: int) -> np.ndarray:
    """Resizes the largest centred square of an image to uint8 [size, size, 3] (bicubic, antialiased)."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        image = image.convert("RGB")
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        # Crop first: resizing a box would look beyond its edges.
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def name_unreadable(unreadable, named: set[int] | None = None) -> None:
    """Warns about each (index, reason) whose index is not in `named` yet, and adds it there."""
    named = set() if named is None else named
    for index, reason in unreadable:
        if index not in named:
            named.add(index)
            warnings.warn(
                f"image {index} cannot be read and counts as a zero gradient (in evaluation as wrong): {reason}",
                stacklevel=3,
            )


def file_hashes(files: list[pathlib.Path]) -> str:
    """Returns one SHA-256 (hex) over names and contents of the files, in sorted order.

    The hash of a file is cached in the user's cache directory, by its size, inode and times of change.
    """
    digest, kept = hashlib.sha256(), pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), HASHES)
    files = sorted(files)
    for directory, group in itertools.groupby(files, lambda path: path.parent):
        place = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:32]
        memory = kept.expanduser() / f"{place}.json"
        try:
            known = json.loads(memory.read_text())
        except (OSError, ValueError):
            known = {}
        before = len(known)
        for path in group:
            stat = path.stat()
            key = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
            if key not in known:
                with open(path, "rb") as file:
                    known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{directory.name}/{path.name} {known[key]}\n".encode())
        if len(known) == before:
            continue
        with contextlib.suppress(OSError):  # another process writes the same, or the cache is read-only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(memory, json.dumps(known))
    return digest.hexdigest()


def class_folders(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the folders in `folder` that are not hidden, sorted: its classes."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))
