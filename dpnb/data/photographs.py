"""Photographs that stay on disk: each is read, decoded and resized when it is drawn.

Random access (TFDS data sources in array_record, or a folder per class) makes Poisson sampling exact on
data sets of any size: the sampler draws indices, and only those images are read, by Grain's threads or
worker processes, ahead of the device and in bounded memory.  Pillow, TFDS and Grain are imported only
when they are used.

Photographs in folders are turned as their EXIF orientation says.  Those of TFDS (ImageNet) are not, as is
usual in the field.  The note of each data set says which.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dpnb.data import recipe as recipes
from dpnb.data.dataset import FOLDER_SPLITS, PHOTOGRAPH_SPLITS, DataError, Dataset, reported_split
from dpnb.data.decoding import UndecodableError, decode
from dpnb.data.hashes import copies
from dpnb.data.prefetch import READ_AHEAD, GivenBatches, Plan, cores, end_with_parent
from dpnb.data.recipe import Recipe
from dpnb.data.sources import (
    SUFFIXES,
    UNREADABLE,
    FolderSource,
    TfdsSource,
    class_folders,
    name_unreadable,
    printable,
)
from dpnb.data.tfds import prepared

PROBES = 16  # photographs of a split that are tried when it is opened, until one can be read
OVERLAP = "photographs to report on may be among those trained on"
TURNED = "photographs turned as their EXIF orientation says"
NOT_TURNED = "EXIF orientation ignored, as usual for TFDS's data sets"


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
    workers: processes that read and decode; 0 for threads of this one, one more than there are cores (Pillow
      decodes outside Python's lock). On two cores processes were between a quarter slower and a sixth faster.
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
        upright = getattr(self.source, "upright", True)
        for row, index in enumerate(indices):
            if not mask[row]:
                continue
            encoded, label, name = self._encoded(int(index))
            try:
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"label {label} of {self.num_classes} classes")
                images[row] = decode(encoded, self.size, upright)
                labels[row] = label
            except (ImportError, MemoryError):  # not the photograph's fault
                raise
            except Exception as error:  # Pillow raises many kinds
                kind = "" if isinstance(error, UndecodableError) else f"{type(error).__name__}: "
                unreadable.append((int(index), f"{name or 'photograph'} ({kind}{error})"))
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
            ahead = ahead.mp_prefetch(options, worker_init_fn=end_with_parent)
        return iter(ahead)


@dataclasses.dataclass(frozen=True, eq=False)
class PhotographDataset(Dataset):
    """A data set of `Photographs`; views are squares of `size` x `size` pixels.

    The guarantee is for one photograph. Somebody with k copies of one in the training split, or k different
    ones, has that of the group of k, which is weaker.

    allow_overlap: whether photographs to report on may be among those to train on.

    Raises:
      DataError: a split has no photograph, or none of some that are tried can be read.
    """

    size: int = 224
    allow_overlap: bool = False

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        for which, split in (("train", self.train), ("test", self.test)):
            if not len(split):
                raise DataError(f"{self.name} needs photographs in its {which} split, got none")
            _probe(self.name, which, split)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one view: (size, size, 3)."""
        return (self.size, self.size, 3)

    @property
    def recipe(self) -> Recipe:
        """Random crops of `size` pixels and ImageNet's statistics, see `dpnb.data.recipe.photographs`."""
        return recipes.photographs(self.size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all files, the classes, the size, and which photographs are in each split.

        Every byte is read once; after that a file is trusted as long as its size, inode and times of change
        stay the same.  Files of a data set that is open are looked at once.  Copies among the training
        photographs of a folder, the same to the byte, are counted in a warning; TFDS does not show them.

        Raises:
          DataError: photographs to report on are among those to train on, and that was not allowed.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            chosen = split.chosen
            digest.update(f"{chosen} of {len(split.source)}, {self.size} pixels".encode())
            digest.update(split.source.content.digest.encode())
        self._check_copies()
        return digest.hexdigest()

    def _check_copies(self) -> None:
        train, test = (
            (part.source.content.images[rows], part.source.content.labels[rows])
            for part in (self.train, self.test)
            for rows in (slice(part.chosen.start, part.chosen.stop),)
        )
        again, elsewhere = copies(*train)
        if again:
            warnings.warn(
                f"{again} of {len(self.train)} training photographs of {self.name} are copies of others, "
                f"{elsewhere} of them under another class: the guarantee is for one photograph, so that for "
                "somebody with k copies it is the weaker one of a group of k; remove the copies",
                stacklevel=4,  # at who asks for the fingerprint
            )
        shared = int(np.isin(test[0], train[0]).sum())
        if shared and not self.allow_overlap:
            raise DataError(
                f"photographs to report on must not be among those to train on, got {shared} of "
                f"{len(self.test)} of {self.name} that are copies, to the byte; remove them from train, or "
                "set DPNB_ALLOW_OVERLAP=1 (in Python: load with allow_overlap=True)"
            )


def _probe(name: str, which: str, split: Photographs) -> None:
    """Tries to read photographs spread over a split, until one can be read.

    Raises:
      DataError: none of them can be read.
    """
    reasons = []
    for index in np.linspace(0, len(split) - 1, min(PROBES, len(split)), dtype=np.int32):
        unreadable = split.read(np.array([index]), np.ones(1, bool)).unreadable
        if not unreadable:
            return
        reasons.append(unreadable[0][1])
    raise DataError(
        f"photographs must be readable, but of the {which} split of {name} none of {len(reasons)} that were "
        f"tried can be read: {'; '.join(reasons[:3])}"
    )


def load(
    name: str,
    size: int,
    *,
    data_dir=None,
    validation: int = 0,
    note: str = "",
    workers: int = 0,
    allow_overlap: bool | None = None,
) -> Dataset:
    """Opens a data set of photographs; nothing but the list of them, and one or a few of them, is read yet.

    Hidden files and folders are left out. What else is not read is named in a warning: photographs that lie
    in no folder of a class, files without a suffix of `SUFFIXES`, pipes, and links that lead nowhere.

    Args:
      name: a TFDS data set below `data_dir` prepared as array_record, such as "imagenet2012" or
        "places365_small"; or a folder there, `name`/train/CLASS/IMAGE and `name`/val/CLASS/IMAGE.
      size: side of a view in pixels.
      data_dir: directory of TFDS, or of the folder; None for TFDS's default, and for the current directory.
      validation: how many training photographs to hold out, the last ones, and to report on instead.
      note: a caveat about the data, for their records, beside what this function says there itself.
      workers: processes that decode; 0 for threads, see `Photographs`.
      allow_overlap: whether photographs to report on may be among those to train on; the note then says so.
        None: whether the environment variable DPNB_ALLOW_OVERLAP is 1.
    Raises:
      DataError: there is no such data set or no split to report on, it has no random access, or its
        photographs cannot be read.
    """
    if allow_overlap is None:
        allow_overlap = os.environ.get("DPNB_ALLOW_OVERLAP") == "1"
    folder = pathlib.Path(data_dir or ".").expanduser() / name
    if (folder / "train").is_dir():
        (train, test), classes = _folders(folder)
        notes = [TURNED]
    else:
        try:
            (train, test), classes = _tfds(name, data_dir)
            notes = [NOT_TURNED]
        except DataError as error:
            raise DataError(
                f"photographs are read from TFDS or from {folder}/train/CLASS/IMAGE, and there is no such "
                f"folder; nor in TFDS: {error}"
            ) from error
    n = len(train)
    if validation and not 0 < validation < n:
        raise DataError(f"validation must leave images to train on: 0 to {n - 1}, got {validation}")
    split = functools.partial(Photographs, num_classes=len(classes), size=size, workers=workers)
    reported = (
        split(train, chosen=range(n - validation, n)) if validation else split(test, chosen=range(len(test)))
    )
    notes = [own for own in notes + [OVERLAP] * allow_overlap if own not in note] + [note] * bool(note)
    train = split(train, chosen=range(n - validation))
    return PhotographDataset(
        name, train, reported, classes, "; ".join(notes), size=size, allow_overlap=allow_overlap
    )


def _folders(folder: pathlib.Path):
    classes, beside = class_folders(folder / "train")
    name = reported_split([s for s in FOLDER_SPLITS if (folder / s).is_dir()], FOLDER_SPLITS)
    if name is None:
        raise DataError(f"{folder} needs a folder val (or validation, test) beside train to report on")
    report = folder / name
    tested, beside_tested = class_folders(report)
    unknown = {*tested} - {*classes}
    if unknown:
        raise DataError(f"classes of {report} must be those of train, got also {sorted(unknown)[:3]}")
    sources = FolderSource(folder / "train", classes), FolderSource(report, classes)
    for source, what in zip(sources, ("learnt", "tested"), strict=True):
        found = np.bincount(source.listed.labels, minlength=len(classes))
        empty = [classes[label] for label in np.flatnonzero(found == 0)]
        if empty:
            _warn(f"{len(empty)} classes are not {what}: {source.root} has no photograph of {empty[:3]}")
    beside = [f"train/{entry}" for entry in beside] + [f"{name}/{entry}" for entry in beside_tested]
    others, special = (
        [f"{source.root.name}/{path}" for source in sources for path in getattr(source.listed, field)]
        for field in ("others", "special")
    )
    for left_out, why in (
        (beside, "they are no folders of a class, and photographs lie in one"),
        (others, f"photographs end in {', '.join(SUFFIXES)}"),
        (special, "they are no regular files (pipes, devices, folders, links that lead nowhere)"),
    ):
        if left_out:
            example = printable(left_out[0])
            _warn(f"{len(left_out)} files below {folder} are not read, such as {example}: {why}")
    return sources, classes


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # at the caller of `dpnb.data.load`


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
    if not all(source.files for source in sources):
        raise DataError(
            f"{name} needs files of its splits train and {report} in {builder.data_path}, got none"
        )
    return sources, tuple(builder.info.features["label"].names)
