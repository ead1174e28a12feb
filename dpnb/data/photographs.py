"""Photographs that stay on disk: each is read, decoded and resized when it is drawn.

Random access (TFDS data sources in array_record, or a folder per class) makes Poisson sampling exact on
data sets of any size: the sampler draws indices, and only those images are read, by Grain's threads or
worker processes, ahead of the device and in bounded memory.  Pillow, TFDS and Grain are imported only
when they are used.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dpnb.data import recipe as recipes
from dpnb.data.dataset import FOLDER_SPLITS, PHOTOGRAPH_SPLITS, DataError, Dataset, reported_split
from dpnb.data.prefetch import READ_AHEAD, GivenBatches, Plan, cores
from dpnb.data.recipe import Recipe
from dpnb.data.sources import (
    SUFFIXES,
    UNREADABLE,
    FolderSource,
    TfdsSource,
    class_folders,
    decode,
    file_hashes,
    name_unreadable,
)
from dpnb.data.tfds import prepared


class Batch(NamedTuple):
    """A batch of decoded photographs.

    images: uint8 [size, s, s, 3]; unreadable ones and padding are black.
    labels: int32 [size], -1 for unreadable images and padding.
    indices: int32 [size], positions in the split.
    mask: bool [size], False for padding.
    unreadable: (index, name and reason) of each image that could not be decoded.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    mask: np.ndarray
    unreadable: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
    """A split of labelled photographs on disk, the counterpart of `dpnb.data.Split` in memory.

    source: a `dpnb.data.sources.Source` of encoded images.
    num_classes: labels are 0 to num_classes - 1.
    size: side in pixels of the images that `read` returns.
    chosen: the photographs of the source that belong to the split, as a range.
    workers: processes that read and decode; 0 for threads of this one (Pillow decodes outside Python's lock).
    """

    source: Any
    num_classes: int
    size: int
    chosen: range
    workers: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def head(self, n: int) -> "Photographs":
        """Returns the first n photographs (all, if there are fewer)."""
        return dataclasses.replace(self, chosen=self.chosen[:n])

    def resized(self, size: int) -> "Photographs":
        """Returns the same photographs at size x size pixels."""
        return dataclasses.replace(self, size=size)

    def read(self, indices: np.ndarray, mask: np.ndarray) -> Batch:
        """Reads and decodes photographs; undecodable ones are black, get the label -1, and are listed.

        Args:
          indices: int32 [n], positions in the split.
          mask: bool [n]; rows that are False are not read.
        Raises:
          OSError, RuntimeError ...: the disk failed.  Such a photograph does *not* count as unreadable: a
            repeated update has to see the same photographs, or the difference of the two would be a gradient
            without noise.
        """
        images = np.zeros((len(indices), self.size, self.size, 3), np.uint8)
        labels, unreadable = np.full(len(indices), UNREADABLE, np.int32), []
        for row, index in enumerate(indices):
            if not mask[row]:
                continue
            encoded, label, name = self._encoded(int(index))
            try:
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"label {label} of {self.num_classes} classes")
                images[row] = decode(encoded, self.size)
                labels[row] = label
            except (ImportError, MemoryError):  # not the photograph's fault
                raise
            except Exception as error:  # Pillow raises many kinds
                reason = f"{name or 'photograph'} ({type(error).__name__}: {error})"
                unreadable.append((int(index), reason))
                images[row] = 0
        return Batch(images, labels, indices, mask, tuple(unreadable))

    def _encoded(self, index: int) -> tuple[bytes, int, str]:
        """Reads one encoded photograph; a disk or network that fails is tried again, twice."""
        for wait in (0.5, 2.0):
            try:
                return self.source[self.chosen[index]]
            except (OSError, RuntimeError):  # array_record raises the latter
                time.sleep(wait)
        return self.source[self.chosen[index]]

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all photographs in order, read ahead: (images uint8 [size or fewer, s, s, 3], labels int32).

        Each unreadable photograph is named in a warning.
        """
        parts = [np.arange(a, min(a + size, len(self)), dtype=np.int32) for a in range(0, len(self), size)]
        for batch in self._ahead(GivenBatches(parts)):
            name_unreadable(batch.unreadable)
            yield batch.images, batch.labels

    def stream(self, sampler, size: int, rows: slice, first: int) -> Iterator[tuple[int, Batch]]:
        """Yields (update, physical batch) of the updates first, first + 1, ... without end, read ahead.

        An update that draws nothing has no batches.

        Args:
          sampler: has `indices(step)`, see `dpnb.privacy.sampling`.
          size: examples in a physical batch, over all processes.
          rows: the part of each batch that this process reads.
          first: the first update.
        """
        plan = Plan(sampler, size, first)
        for number, batch in enumerate(self._ahead(plan, rows)):
            yield plan.step_of(number), batch

    def _ahead(self, plan, rows: slice = slice(None)) -> Iterator[Batch]:
        import grain

        threads, one = cores() + 1, 3 * self.size**2 * len(range(plan.size)[rows])
        batches = int(min(2 * threads, max(2, READ_AHEAD // one)))
        options = grain.ReadOptions(num_threads=min(threads, batches), prefetch_buffer_size=batches)
        ahead = grain.MapDataset.source(plan).map(lambda part: self.read(part[0][rows], part[1][rows]))
        ahead = ahead.to_iter_dataset(options)
        if self.workers:
            from absl import flags

            flags.FLAGS.mark_as_parsed()  # Grain's workers read them, and a notebook has no command line
            options = grain.multiprocessing.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            ahead = ahead.mp_prefetch(options)
        return iter(ahead)


@dataclasses.dataclass(frozen=True, eq=False)
class PhotographDataset(Dataset):
    """A data set of `Photographs`; views are squares of `size` x `size` pixels.

    Raises:
      DataError: a split has no photograph, or no file.
    """

    size: int = 224

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        for which, split in (("train", self.train), ("test", self.test)):
            if not len(split) or not split.source.files:
                raise DataError(f"{self.name} needs photographs in its {which} split, got none")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view: (size, size, 3)."""
        return (self.size, self.size, 3)

    @property
    def recipe(self) -> Recipe:
        """Random crops of `size` pixels and ImageNet's statistics, see `dpnb.data.recipe.photographs`."""
        return recipes.photographs(self.size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all files, the classes, the size, and which photographs are in each split.

        Every byte is read once; after that a file is trusted as long as its size, inode and times of change
        stay the same.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            chosen = split.chosen
            digest.update(f"{chosen} of {len(split.source)}, {self.size} pixels".encode())
            digest.update(file_hashes(split.source.files).encode())
        return digest.hexdigest()


def load(
    name: str, size: int, *, data_dir=None, validation: int = 0, note: str = "", workers: int = 0
) -> Dataset:
    """Opens a data set of photographs; nothing but the list of them is read yet.

    Args:
      name: a TFDS data set below `data_dir` prepared as array_record, such as "imagenet2012" or
        "places365_small"; or a folder there, `name`/train/CLASS/IMAGE and `name`/val/CLASS/IMAGE.
      size: side of a view in pixels.
      data_dir: directory of TFDS, or of the folder; None for TFDS's default, and for the current directory.
      validation: how many training photographs to hold out, the last ones, and to report on instead.
      note: a caveat about the data, for their records.
      workers: processes that decode; 0 for threads.
    Raises:
      DataError: there is no such data set or no split to report on, or it has no random access.
    """
    folder = pathlib.Path(data_dir or ".").expanduser() / name
    if (folder / "train").is_dir():
        (train, test), classes = _folders(folder)
    else:
        try:
            (train, test), classes = _tfds(name, data_dir)
        except DataError as error:
            raise DataError(
                f"photographs are read from TFDS or from {folder}/train/CLASS/IMAGE, and there is no such folder; "
                f"nor in TFDS: {error}"
            ) from error
    n = len(train)
    if validation and not 0 < validation < n:
        raise DataError(f"validation must leave images to train on: 0 to {n - 1}, got {validation}")
    split = functools.partial(Photographs, num_classes=len(classes), size=size, workers=workers)
    reported = (
        split(train, chosen=range(n - validation, n)) if validation else split(test, chosen=range(len(test)))
    )
    return PhotographDataset(
        name, split(train, chosen=range(n - validation)), reported, classes, note, size=size
    )


def _folders(folder: pathlib.Path):
    classes = class_folders(folder / "train")
    name = reported_split([s for s in FOLDER_SPLITS if (folder / s).is_dir()], FOLDER_SPLITS)
    if name is None:
        raise DataError(f"{folder} needs a folder val (or validation, test) beside train to report on")
    report = folder / name
    unknown = {*class_folders(report)} - {*classes}
    if unknown:
        raise DataError(f"classes of {report} must be those of train, got also {sorted(unknown)[:3]}")
    sources = FolderSource(folder / "train", classes), FolderSource(report, classes)
    for source, what in zip(sources, ("learnt", "tested"), strict=True):
        empty = sorted({*classes} - {p.parent.name for p in source.files})
        if empty:
            warnings.warn(
                f"{len(empty)} classes are not {what}: {source.root} has no photograph of {empty[:3]}",
                stacklevel=4,
            )
    others = [path.name for source in sources for path in source.listed[1]]
    if others:
        warnings.warn(
            f"{len(others)} files below {folder} are not read, such as {others[0]}; photographs end in {', '.join(SUFFIXES)}",
            stacklevel=4,
        )
    return sources, classes


def _tfds(name: str, data_dir):
    builder = prepared(name, data_dir)
    missing = {"image", "label"} - set(builder.info.features)
    report = reported_split(builder.info.splits, PHOTOGRAPH_SPLITS)
    if missing or report is None or "train" not in builder.info.splits:
        raise DataError(
            f"{name} needs images, labels, and a train and a validation split, got "
            f"{list(builder.info.features)} and {list(builder.info.splits)}"
        )
    sources = tuple(TfdsSource(str(builder.data_path), s) for s in ("train", report))
    return sources, tuple(builder.info.features["label"].names)
