"""Loads a data set by name: through TFDS, from an array file, or generated here (digits, textures, dead leaves)."""

import dataclasses
import pathlib

import numpy as np

from dpnb.data import array_cache
from dpnb.data.dataset import (
    CIFAR10_CLASSES,
    CLASSES,
    INSTALL,
    SMALL_IMAGE_SPLITS,
    DataError,
    Dataset,
    Split,
    reported_split,
)
from dpnb.data.tfds import damaged, prepared
from dpnb.files import atomic_file


def load(
    name: str, *, data_dir=None, file=None, validation: int = 0, note: str = "", image_size: int = 0
) -> Dataset:
    """Loads a data set into memory, or opens (`image_size`) photographs that stay on disk.

    Args:
      name: "cifar10", "cifar100" or any TFDS data set of small images of one size that is prepared
        below `data_dir`, such as "imagenet_resized/32x32" (in TFDS's order); "digits" (scikit-learn's
        8x8 digits, upscaled and coloured to 32x32x3: small, no download); or "textures" or "dead-leaves"
        (`dpnb.data.textures`, generated here in a minute or two). With `file`, any name.
      data_dir: TFDS directory; None for TFDS's own default.
      file: array file written by `save`; needs neither TFDS nor scikit-learn.
      validation: how many training images to hold out, the last ones, and to report on instead of the
        test images, which are then left out of the data set (the paper tuned with 5,000 of CIFAR's 50,000).
      note: a caveat about the data, added to that of the file.
      image_size: side of a view in pixels, for photographs of any size (see `dpnb.data.photographs.load`);
        0 for images in memory.
    Raises:
      DataError: the name is unknown, data are missing or malformed, or packages are missing; the message
        says what to run.
    """
    if image_size:
        from dpnb.data import photographs

        if file is not None:
            raise DataError(f"photographs stay on disk and come from data_dir, got the array file {file}")
        return photographs.load(name, image_size, data_dir=data_dir, validation=validation, note=note)
    if file is not None:
        data = _load_file(name, pathlib.Path(file).expanduser())
    elif name == "digits":
        data = _load_digits()
    elif name in ("textures", "dead-leaves"):
        from dpnb.data import textures

        data = textures.dataset() if name == "textures" else textures.only_dead_leaves()
    else:
        data = array_cache.kept(name, data_dir, _load_tfds)
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
    """Writes an array file (.npz) for `load(name, file=path)`, atomically."""
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as out:
        np.savez(
            out,
            train_images=dataset.train.images, train_labels=dataset.train.labels,
            test_images=dataset.test.images, test_labels=dataset.test.labels,
            classes=np.array(dataset.classes), note=np.array(dataset.note),
        )  # fmt: skip


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
    except Exception as error:  # NumPy, zipfile, zlib and tokenize each raise their own
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
    """Returns 1,500 + 297 digits, 8x8 interpolated to 32x32, in random bright ink on random dark paper.

    The colours and the split come from a fixed seed and do not depend on the label.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn; run: pip install scikit-learn") from error
    digits = load_digits()
    random = np.random.RandomState(0)  # a frozen stream: the data set never changes
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
    report = reported_split(builder.info.splits, SMALL_IMAGE_SPLITS)
    if report is None or "train" not in builder.info.splits:
        raise DataError(
            f"{name} needs a train and a test or validation split, got {list(builder.info.splits)}"
        )

    def read(split: str) -> Split:
        source = builder.as_data_source(split=split)
        images, labels = np.empty((len(source), *shape), np.uint8), np.empty(len(source), np.int32)
        for start in range(0, len(source), 1000):  # in bulk, in half the time of one by one
            rows = list(range(start, min(start + 1000, len(source))))
            for row, example in zip(rows, source.__getitems__(rows), strict=True):
                images[row], labels[row] = example["image"], example["label"]
        return Split(images, labels)

    try:
        train, test = read("train"), read(report)
    except ImportError as error:
        raise DataError(f"reading {where} needs array_record and Pillow ({error}); run: {INSTALL}") from error
    except Exception as error:  # TFDS, array_record and Pillow each raise their own
        raise damaged(where, f"{type(error).__name__}: {error}", name, data_dir) from error
    classes = tuple(builder.info.features["label"].names)
    if name == "cifar10" and classes == tuple(map(str, range(10))):  # prepared without its names
        classes = CIFAR10_CLASSES
    return Dataset(name, train, test, classes)
