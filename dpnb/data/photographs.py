"""Photographs that stay on disk: each is read, decoded and resized when it is drawn.

Random access (TFDS data sources in array_record, or a folder of folders) makes Poisson sampling exact on
data sets of any size: the sampler draws indices, and only those images are read, by Grain's threads or
worker processes, ahead of the device and in bounded memory.  Pillow, TFDS and Grain are imported where
they are used.
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
from dpnb.data.dataset import DataError, Dataset
from dpnb.data.prefetch import READ_AHEAD, GivenBatches, Plan, cores
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
    """images uint8 [size, s, s, 3]; labels int32 [size], -1 where unreadable; indices int32 [size] in the
    split; mask bool [size], False for padding; unreadable: (index, name and reason) of images that
    could not be read, which are black here."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    mask: np.ndarray
    unreadable: tuple[tuple[int, str], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Photographs:
    """Labelled photographs on disk: what a `dpnb.data.Split` is to images in memory.

    source: of encoded images.
    num_classes: labels are 0 to num_classes - 1.
    size: pixels of a side of what `read` gives.
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
        """The first n photographs (all, where there are fewer)."""
        return dataclasses.replace(self, chosen=self.chosen[:n])

    def resized(self, size: int) -> "Photographs":
        """The same photographs, size x size pixels."""
        return dataclasses.replace(self, size=size)

    def read(self, indices: np.ndarray, mask: np.ndarray) -> Batch:
        """Reads and decodes; what cannot be decoded is black, has the label -1, and is named.

        Raises:
          OSError, RuntimeError ...: of the disk.  Such a photograph is *not* taken for an unreadable one: the
            same update has to see the same photographs when it is repeated, or the difference would be a
            gradient without noise.
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
            except (ImportError, MemoryError):  # nothing that the photograph can help
                raise
            except Exception as error:  # Pillow has many
                reason = f"{name or 'photograph'} ({type(error).__name__}: {error})"
                unreadable.append((int(index), reason))
                images[row] = 0
        return Batch(images, labels, indices, mask, tuple(unreadable))

    def _encoded(self, index: int) -> tuple[bytes, int, str]:
        """A disk or network that stumbles is asked again, twice."""
        for wait in (0.5, 2.0):
            try:
                return self.source[self.chosen[index]]
            except (OSError, RuntimeError):  # array_record raises the latter
                time.sleep(wait)
        return self.source[self.chosen[index]]

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All photographs in order: (images uint8 [size or fewer, s, s, 3], labels int32), read ahead."""
        parts = [np.arange(a, min(a + size, len(self)), dtype=np.int32) for a in range(0, len(self), size)]
        for batch in self._ahead(GivenBatches(parts)):
            name_unreadable(batch.unreadable)
            yield batch.images, batch.labels

    def stream(self, sampler, size: int, rows: slice, first: int) -> Iterator[tuple[int, Batch]]:
        """Physical batches of the updates first, first + 1, ... without end: (update, batch), read ahead.

        Args:
          sampler: `indices(step)`, see `dpnb.privacy.sampling`.
          size: examples in a physical batch, over all processes.
          rows: the part of each that this process reads.
          first: the first update. One that draws nothing has no batches.
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

            flags.FLAGS.mark_as_parsed()  # Grain's workers ask for them, and a notebook has no command line
            options = grain.multiprocessing.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            ahead = ahead.mp_prefetch(options)
        return iter(ahead)


@dataclasses.dataclass(frozen=True, eq=False)
class PhotographDataset(Dataset):
    """A data set of `Photographs`; views are squares of `size` pixels."""

    size: int = 224

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        for which, split in (("train", self.train), ("test", self.test)):
            if not len(split) or not split.source.files:
                raise DataError(f"{self.name} needs photographs in its {which} split, got no file of them")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 3)

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.photographs(self.size)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all files, the classes, and which of their photographs are in each split.

        Every byte is read once; then a file is trusted while its size and times of change stay.
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
    """A data set of photographs, of which nothing is read yet but the list.

    Args:
      name: a TFDS data set below `data_dir` prepared as array_record, such as "imagenet2012" or
        "places365_small"; or a folder there, `name`/train/CLASS/IMAGE and `name`/val/CLASS/IMAGE.
      size: pixels of a view's side.
      validation: hold out the last so many training photographs and report on them instead.
      workers: processes that decode; 0 for threads.
    Raises:
      DataError: nothing of that name there, no split to report on, or not readable at random.
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
    report = next((folder / s for s in ("val", "validation", "test") if (folder / s).is_dir()), None)
    if report is None:
        raise DataError(f"{folder} needs a folder val (or validation, test) beside train to report on")
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
    report = next((s for s in ("validation", "val", "test") if s in builder.info.splits), None)
    if missing or report is None or "train" not in builder.info.splits:
        raise DataError(
            f"{name} needs images, labels, and a train and a validation split, got "
            f"{list(builder.info.features)} and {list(builder.info.splits)}"
        )
    sources = tuple(TfdsSource(str(builder.data_path), s) for s in ("train", report))
    return sources, tuple(builder.info.features["label"].names)
