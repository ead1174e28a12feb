"""TFDS without TensorFlow: finds a data set that is prepared with random access."""

import os
import pathlib

from dpnb.data.dataset import CLASSES, INSTALL, DataError


def tfds_or_error():
    """Imports and returns `tensorflow_datasets`.

    Raises:
      DataError: it is not installed; the message says what to run.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading CIFAR needs TFDS ({error}); run: {INSTALL}, or pass `file` (an .npz exported elsewhere)"
        ) from error
    return tfds


def command(name: str, data_dir) -> str:
    """Returns the shell command that prepares a data set below `data_dir` (None for TFDS's default)."""
    if name not in CLASSES:
        return f"tfds build {name} --file_format=array_record" + (
            f" --data_dir {data_dir}" if data_dir else ""
        )
    return f"python -m dpnb.data {name}" + (f" --data-dir {data_dir}" if data_dir is not None else "")


def prepared(name: str, data_dir):
    """Returns the TFDS builder of a data set that is prepared with random access.

    Raises:
      DataError: TFDS is missing, or no such data set is prepared this way; the message says what to run.
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
