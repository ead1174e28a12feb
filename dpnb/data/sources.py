"""Encoded images on disk by number: a folder per class, or one split of a TFDS data set."""

import array
import dataclasses
import functools
import hashlib
import os
import pathlib
import warnings
from typing import NamedTuple, Protocol

import numpy as np

from dpnb.data.dataset import DataError
from dpnb.data.hashes import hash_files
from dpnb.data.tfds import tfds_or_error

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREADABLE = -1  # the label of an image that could not be read; its gradient is zero


class Source(Protocol):
    """Encoded images by number.

    upright: whether they are to be turned as their EXIF orientation says; they are, if this is missing.
    content: the hashes of everything that they come from.
    """

    upright: bool

    @property
    def content(self) -> "Content":
        """The hashes of names and contents of all files, and of each image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        """Returns (encoded image, label, name)."""


class Content(NamedTuple):
    """What a source holds, for comparison.

    digest: SHA-256 in hexadecimal over names and contents of all files.
    images: SHA-256 of each image, bytes [n], in the source's order; empty if images share files.
    labels: int32 [n], beside them.
    """

    digest: str
    images: np.ndarray
    labels: np.ndarray


class Listing(NamedTuple):
    """The photographs below a folder, in order, and what is not read.

    names: of each file, without its folder.
    labels: int32 [n], positions of their classes.
    others: CLASS/NAME of what has another suffix; hidden files are nowhere.
    special: CLASS/NAME of what is no regular file: pipes, devices, folders, links that lead nowhere.
    """

    names: list[str]
    labels: np.ndarray
    others: list[str]
    special: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images ROOT/CLASS/IMAGE; classes may be absent.

    Their order is fixed and mixes the classes, so the first or the last photographs contain all of them.
    """

    root: pathlib.Path
    classes: tuple[str, ...]

    upright = True

    @functools.cached_property
    def listed(self) -> Listing:
        """The photographs in that order, and what else the folders of the classes hold."""
        names, labels, others, special, keys = [], array.array("i"), [], [], bytearray()
        for label, folder in enumerate(self.classes):
            path = os.path.join(self.root, folder)
            if not os.path.isdir(path):
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if not name.lower().endswith(SUFFIXES):
                        others.append(f"{folder}/{name}")
                    elif not entry.is_file():
                        special.append(f"{folder}/{name}")
                    else:
                        names.append(name)
                        labels.append(label)
                        keys += hashlib.sha256(os.fsencode(f"{folder}/{name}")).digest()
        order = np.frombuffer(keys, "S32").argsort(kind="stable")
        labels = np.array(labels, np.int32)[order]
        return Listing([names[row] for row in order], labels, sorted(others), sorted(special))

    @functools.cached_property
    def content(self) -> Content:
        """See `Source`; computed once."""
        positions, folders = [], []
        by_class = np.argsort(self.listed.labels, kind="stable")
        parts = np.split(
            by_class, np.cumsum(np.bincount(self.listed.labels, minlength=len(self.classes)))[:-1]
        )
        for folder, part in sorted(zip(self.classes, parts, strict=True)):
            here = sorted(part.tolist(), key=self.listed.names.__getitem__)
            positions.append(np.array(here, np.int64))
            folders.append((os.path.join(self.root, folder), [self.listed.names[row] for row in here]))
        digest, sorted_hashes = hash_files(pair for pair in folders if pair[1])
        hashes = np.empty_like(sorted_hashes)
        hashes[np.concatenate(positions)] = sorted_hashes
        return Content(digest, hashes, self.listed.labels)

    def __getstate__(self) -> dict:  # worker processes need no hashes
        return {name: value for name, value in self.__dict__.items() if name != "content"}

    def name(self, index: int) -> str:
        """Returns CLASS/NAME of a photograph."""
        return f"{self.classes[self.listed.labels[index]]}/{self.listed.names[index]}"

    def __len__(self) -> int:
        return len(self.listed.names)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        name = self.name(index)
        with open(os.path.join(self.root, name), "rb") as file:
            return file.read(), int(self.listed.labels[index]), printable(name)


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """One split of a prepared TFDS data set, its images left encoded; they are not turned, as is usual."""

    directory: str
    split: str

    upright = False

    @functools.cached_property
    def source(self):
        """TFDS's data source of the split, opened at first use."""
        tfds = tfds_or_error()
        builder = tfds.builder_from_directory(self.directory)
        return builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})

    @property
    def files(self) -> list[pathlib.Path]:
        """The files of the split, sorted by name."""
        return sorted(p for p in pathlib.Path(self.directory).glob(f"*-{self.split}.*") if p.is_file())

    @functools.cached_property
    def content(self) -> Content:
        """See `Source`; computed once."""
        digest, _ = hash_files([(self.directory, [file.name for file in self.files])])
        return Content(digest, np.empty(0, "S32"), np.empty(0, np.int32))

    def __reduce__(self):  # worker processes open it anew
        return type(self), (self.directory, self.split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes, int, str]:
        row = self.source[index]
        name = row.get("file_name", b"")
        return row["image"], int(row["label"]), name.decode() if isinstance(name, bytes) else str(name)


def printable(name: str) -> str:
    r"""Returns a file's name with bytes that are not UTF-8 written as \\udc80 to \\udcff.

    >>> printable("caf\udce9.jpg")
    'caf\\udce9.jpg'
    """
    return name.encode(errors="backslashreplace").decode()


def name_unreadable(unreadable, named: set[int] | None = None) -> None:
    """Warns about each (index, reason) whose index is not in `named` yet, and adds it there."""
    named = set() if named is None else named
    for index, reason in unreadable:
        if index not in named:
            named.add(index)
            warnings.warn(
                f"image {index} cannot be read and counts as a zero gradient (in evaluation as wrong): "
                f"{reason}",
                stacklevel=3,
            )


def class_folders(folder: pathlib.Path) -> tuple[tuple[str, ...], list[str]]:
    """Lists the folders in `folder` that are not hidden: its classes.

    Returns:
      (their names, sorted; names of all else there that is not hidden, such as links that lead nowhere).
    Raises:
      DataError: a name is not UTF-8 and cannot be written into records.
    """
    classes, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != ".":
                (classes if entry.is_dir() else others).append(entry.name)
    strange = [name for name in classes if printable(name) != name]
    if strange:
        raise DataError(
            f"names of classes must be UTF-8, as records state them, got {printable(strange[0])} in "
            f"{folder}; rename it"
        )
    return tuple(sorted(classes)), sorted(others)
