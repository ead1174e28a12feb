"""Images and labels: CIFAR-10 and CIFAR-100 through TFDS (without TensorFlow), a file, or digits.

    python -m dpnb.data cifar10 --data-dir DIR                 # download and prepare, once
    python -m dpnb.data cifar10 --data-dir DIR --npz FILE      # and export one array file

A whole data set fits in memory as uint8 (CIFAR-10: 176 MiB) and goes to the device as it is.
TFDS, Pillow and scikit-learn are imported only where they are used.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from dpnb import augment

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "textures": 192}
INSTALL = "pip install tensorflow-datasets array-record pillow"


class DataError(ValueError):
    """The data is missing, unreadable or malformed; the message says what to run."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Split:
    """images uint8 [n, h, w, 3] and labels int32 [n], both read-only, n >= 1."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        images, labels = np.asarray(self.images), np.asarray(self.labels)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images must be uint8 [n, h, w, 3], got {images.dtype} {list(images.shape)}; "
                "channels come last, values are 0 to 255, not yet normalised"
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels must be integers [{len(images)}], one for each image, got "
                f"{labels.dtype} {list(labels.shape)}; one-hot labels need an argmax"
            )
        if not len(images):
            raise DataError("a split needs at least one image, got none; prepare or export the data again")
        small = np.iinfo(np.int32)
        if labels.min() < small.min or labels.max() > small.max:
            raise DataError(f"labels must fit int32, got {labels.min()} to {labels.max()}")
        for name, array in (("images", images), ("labels", labels.astype(np.int32))):
            array = array.view()
            array.flags.writeable = False  # the fingerprint stays true
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.images)

    def head(self, n: int) -> "Split":
        """The first n images (all, where there are fewer)."""
        return Split(self.images[:n], self.labels[:n])

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images in order: (images [size or fewer, h, w, 3], labels)."""
        return in_batches(self, size)

    def __repr__(self) -> str:
        return f"Split(uint8 {list(self.images.shape)})"


def in_batches(split, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`split.images` and `split.labels`, `size` rows (at the end fewer) at a time."""
    for start in range(0, len(split), size):
        yield split.images[start : start + size], split.labels[start : start + size]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training images and the split to report on (test, or held-out validation).

    `note` is a caveat about the data to repeat beside every accuracy; "" if there is none.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    note: str = ""
    lowest_label = 0  # no field

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(
                "train and test images must have one shape, got "
                f"{list(self.train.images.shape[1:])} and {list(self.test.images.shape[1:])}"
            )
        for which, split in (("train", self.train), ("test", self.test)):
            low, high = split.labels.min(), split.labels.max()
            if low < self.lowest_label or high >= len(self.classes):
                raise DataError(
                    f"labels must be 0 to {len(self.classes) - 1} (one name in `classes` each), "
                    f"got {low} to {high} in the {which} split of {self.name}; do labels start at 1?"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a network reads: [h, w, 3]."""
        return self.train.images.shape[1:]

    @property
    def recipe(self) -> augment.Recipe:
        """How images become what a network reads."""
        return augment.SMALL_IMAGES

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shapes, images and labels of both splits, order included."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for array, dtype in ((split.images, "u1"), (split.labels, "<i4")):
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array, dtype))
        return digest.hexdigest()


def load(
    name: str, *, data_dir=None, file=None, validation: int = 0, note: str = "", image_size: int = 0
) -> Dataset:
    """A data set in memory, or (`image_size`) photographs that stay on disk.

    Args:
      name: "cifar10", "cifar100" or any TFDS data set of small images of one size that is prepared
        below `data_dir`, such as "imagenet_resized/32x32" (in TFDS's order), or "digits" (scikit-learn's
        8x8 digits, upscaled and coloured to 32x32x3: small, no download), or "textures"
        (`dpnb.textures`, made here in a minute or two). With `file`, any name.
      data_dir: TFDS directory; None for TFDS's own default.
      file: array file written by `save`; needs neither TFDS nor scikit-learn.
      validation: hold out the last so many training images and report on them instead of the
        test images, which are then not touched (the paper tuned with 5,000 of CIFAR's 50,000).
      note: caveat about the data, added to that of the file.
      image_size: pixels of a view's side: photographs of any size, see `dpnb.photographs.load`.
    Raises:
      DataError: unknown name, data missing or malformed, packages missing; says what to run.
    """
    if image_size:
        from dpnb import photographs

        if file is not None:
            raise DataError(f"photographs stay on disk and come from data_dir, got the array file {file}")
        return photographs.load(name, image_size, data_dir=data_dir, validation=validation, note=note)
    if file is not None:
        data = _load_file(name, pathlib.Path(file).expanduser())
    elif name == "digits":
        data = _load_digits()
    elif name == "textures":
        from dpnb import textures

        data = textures.dataset()
    else:
        data = _load_tfds(name, data_dir)
    train, test = data.train, data.test
    if validation:
        if not 0 < validation < len(train):
            raise DataError(
                f"validation must leave images to train on: 0 to {len(train) - 1}, got {validation}"
            )
        test = Split(train.images[-validation:], train.labels[-validation:])
        train = Split(train.images[:-validation], train.labels[:-validation])
    notes = dict.fromkeys(n for n in (data.note, note) if n)  # each once
    return dataclasses.replace(data, train=train, test=test, note="; ".join(notes))


def save(dataset: Dataset, path) -> None:
    """Write an array file for `load(name, file=path)`; a crash leaves no half file behind."""
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            np.savez(
                out,
                train_images=dataset.train.images, train_labels=dataset.train.labels,
                test_images=dataset.test.images, test_labels=dataset.test.labels,
                classes=np.array(dataset.classes), note=np.array(dataset.note),
            )  # fmt: skip
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_file(name: str, path: pathlib.Path) -> Dataset:
    export = f"python -m dpnb.data {name if name in CLASSES else 'cifar10'} --data-dir DIR --npz {path}"
    keys = ("train_images", "train_labels", "test_images", "test_labels", "classes", "note")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            missing = [key for key in keys if key not in arrays]
            if missing:
                raise DataError(f"{path} lacks the arrays {', '.join(missing)}; write it with: {export}")
            found = {key: arrays[key] for key in keys}
    except FileNotFoundError:
        raise DataError(f"there is no array file {path}; copy it there or write it with: {export}") from None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a readable .npz array file ({error}); write it with: {export}"
        ) from error
    classes = tuple(map(str, found["classes"].reshape(-1)))
    if len(classes) != CLASSES.get(name, len(classes)):
        raise DataError(
            f"{name} has {CLASSES[name]} classes, {path} has {len(classes)}; is it another data set?"
        )
    train, test = (Split(found[f"{s}_images"], found[f"{s}_labels"]) for s in ("train", "test"))
    return Dataset(name, train, test, classes, str(found["note"]))


def _load_digits() -> Dataset:
    """1,500 + 297 digits, 8x8 interpolated to 32x32, random bright ink on random dark paper.

    The colours and the split come from a fixed seed and do not depend on the label.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn; run: pip install scikit-learn") from error
    digits = load_digits()
    random = np.random.RandomState(0)  # a frozen stream: the same data set for ever
    order = random.permutation(len(digits.target))
    grey, labels = digits.images[order], digits.target[order]  # 0 to 16
    positions = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weights = np.stack([np.interp(positions, np.arange(8), row) for row in np.eye(8)], axis=1)  # [32, 8]
    grey = (weights @ grey @ weights.T)[..., None] / 16  # eighths and sixteenths: exact
    ink = random.randint(160, 256, (len(labels), 1, 1, 3))
    paper = random.randint(0, 96, (len(labels), 1, 1, 3))
    images = np.rint(paper + (ink - paper) * grey).astype(np.uint8)
    train, test = (Split(images[part], labels[part]) for part in (slice(1500), slice(1500, None)))
    return Dataset("digits", train, test, tuple(map(str, range(10))))


def tfds_or_error():
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading CIFAR needs TFDS ({error}); run: {INSTALL}, or pass `file` (an .npz exported elsewhere)"
        ) from error
    return tfds


def command(name: str, data_dir) -> str:
    if name not in CLASSES:
        return f"tfds build {name} --file_format=array_record" + (
            f" --data_dir {data_dir}" if data_dir else ""
        )
    return f"python -m dpnb.data {name}" + (f" --data-dir {data_dir}" if data_dir is not None else "")


def prepared(name: str, data_dir):
    """The TFDS builder of a data set that is prepared with random access.

    Raises:
      DataError: TFDS is missing, or nothing of that name is prepared so; says what to run.
    """
    tfds = tfds_or_error()
    try:
        builder = tfds.builder(name, data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    except Exception as error:  # not registered, and nothing of that name prepared
        known = ", ".join(CLASSES)
        folder = pathlib.Path(data_dir or ".").expanduser() / name / "train"
        hint = f"; {folder} is a folder: photographs are read with image_size" * folder.is_dir()
        raise DataError(
            f"name must be one of {known}, a data set that TFDS finds below data_dir ({data_dir}), or come "
            f"with `file`; got {name!r} ({type(error).__name__}){hint}"
        ) from error
    where = pathlib.Path(builder.data_path)
    if not where.exists():
        raise DataError(f"{name} is not prepared in {where}; run: {command(name, data_dir)}")
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise DataError(
            f"{where} holds {name} in a format that only TensorFlow reads, without random access; prepare it "
            f"in another directory, as array_record: {command(name, 'DIR')}"
        )
    return builder


def _load_tfds(name: str, data_dir) -> Dataset:
    builder = prepared(name, data_dir)
    where = pathlib.Path(builder.data_path)
    known = dict(builder.info.features.items())
    shape = known["image"].shape if "image" in known else [None]
    if None in shape or "label" not in known:
        raise DataError(
            f"{name} must have an image of one size and a label, got {list(known.items())}; photographs of "
            "any size are read with image_size"
        )
    report = next((s for s in ("test", "validation", "val") if s in builder.info.splits), None)
    if report is None or "train" not in builder.info.splits:
        raise DataError(
            f"{name} needs a train and a test or validation split, got {list(builder.info.splits)}"
        )

    def read(split: str) -> Split:
        source = builder.as_data_source(split=split)
        images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)
        for start in range(0, len(source), 1000):  # in bulk, half the time of one by one
            rows = list(range(start, min(start + 1000, len(source))))
            for row, example in zip(rows, source.__getitems__(rows), strict=True):
                images[row], labels[row] = example["image"], example["label"]
        return Split(images, labels)

    try:
        train, test = read("train"), read(report)
    except ImportError as error:
        raise DataError(f"reading {where} needs array_record and Pillow ({error}); run: {INSTALL}") from error
    except Exception as error:  # TFDS, array_record and Pillow each have their own
        raise DataError(
            f"{where} is damaged ({type(error).__name__}: {error}); delete that directory, then run: "
            f"{command(name, data_dir)}"
        ) from error
    classes = tuple(builder.info.features["label"].names)
    if name == "cifar10" and classes == tuple(map(str, range(10))):  # prepared without its names
        classes = CIFAR10_CLASSES
    return Dataset(name, train, test, classes)


def prepare(name: str, data_dir=None) -> pathlib.Path:
    """Download CIFAR and prepare it with TFDS's own builder, without TensorFlow; once (1 minute).

    Same files, version, order and checksum as TFDS makes elsewhere (array_record). Returns
    the directory that was prepared; does nothing where it exists.

    Raises:
      DataError: TFDS missing, no network, or an archive that is damaged or not the known one.
    """
    from dpnb import cifar

    return cifar.prepare(name, data_dir)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dpnb.data", description="Download and prepare a data set (once), and export it."
    )
    parser.add_argument("name", choices=list(CLASSES))
    parser.add_argument("--data-dir", help="TFDS directory; without it TFDS's default")
    parser.add_argument("--npz", metavar="FILE", help="also write one array file, for machines without TFDS")
    parser.add_argument("--note", default="", help="a caveat about the data, kept in the array file")
    args = parser.parse_args(arguments)
    try:
        if args.name.startswith("cifar"):
            prepare(args.name, args.data_dir)
        data = load(args.name, data_dir=args.data_dir, note=args.note)
        if args.npz:
            save(data, args.npz)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{data.name}: {len(data.train)} train, {len(data.test)} test, sha256 {data.fingerprint}")


if __name__ == "__main__":
    from dpnb.data import main  # the module by its own name, so that there is one DataError

    main()
