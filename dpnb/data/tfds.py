"""TFDS without TensorFlow: finds a data set that is prepared with random access."""

import os
import pathlib

from dpnb.data.dataset import CLASSES, INSTALL, DataError, NotPrepared

INFO = "dataset_info.json"


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


def damaged(where: pathlib.Path, why: str, name: str, data_dir) -> DataError:
    """Returns the error that a prepared data set is damaged."""
    return DataError(
        f"{where} is damaged ({why}); delete that directory, then run: {command(name, data_dir)}"
    )


def prepared(name: str, data_dir):
    """Returns the TFDS builder of a data set that is prepared with random access, and whole.

    Raises:
      NotPrepared: no such data set is prepared this way.
      DataError: TFDS is missing, the name is unknown, or the data set is damaged: `dataset_info.json` cannot
        be read, or its files do not hold the examples that it lists; the message says what to run.
    """
    tfds = tfds_or_error()
    try:
        builder = tfds.builder(name, data_dir=None if data_dir is None else os.path.expanduser(data_dir))
    except Exception as error:  # not registered, and nothing of that name prepared
        root = pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
        if records := sorted(root.rglob("*.array_record*")):
            why = f"{INFO} is not that of this data set, or cannot be read: {type(error).__name__}"
            raise damaged(records[0].parent, why, name, data_dir) from error
        known = ", ".join(CLASSES)
        folder = pathlib.Path(data_dir or ".").expanduser() / name / "train"
        hint = f"; {folder} is a folder: photographs are read with image_size" * folder.is_dir()
        raise NotPrepared(
            f"name must be one of {known}, a data set that TFDS finds below data_dir ({data_dir}), or come "
            f"with `file`; got {name!r} ({type(error).__name__}){hint}"
        ) from error
    where = pathlib.Path(builder.data_path)
    if not where.exists():
        raise NotPrepared(f"{name} is not prepared in {where}; run: {command(name, data_dir)}")
    if not (where / INFO).is_file():
        raise damaged(where, f"it has no {INFO}", name, data_dir)
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise DataError(
            f"{where} holds {name} in a format that only TensorFlow reads, without random access; prepare it "
            f"in another directory, as array_record: {command(name, 'DIR')}"
        )
    if wrong := _contradiction(builder):
        raise damaged(where, wrong, name, data_dir)
    return builder


def _contradiction(builder) -> str:
    """Says what of the files of a builder is not as its `dataset_info.json` has it, "" if all is."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise DataError(
            f"reading {builder.data_path} needs array_record and Pillow ({error}); run: {INSTALL}"
        ) from error
    if not builder.info.splits:
        return f"{INFO} lists no examples"
    for split in builder.info.splits.values():
        if not split.shard_lengths:
            return f"{INFO} does not say how many examples {split.name} has"
        for path, listed in zip(map(pathlib.Path, split.filepaths), split.shard_lengths, strict=True):
            if not path.is_file():
                return f"{path.name} is missing, which {INFO} lists"
            try:
                found = ArrayRecordReader(str(path)).num_records()
            except Exception as error:  # array_record raises many kinds
                return f"{path.name} cannot be read: {type(error).__name__}: {error}"
            if found != listed:
                return f"{path.name} holds {found} examples, and {INFO} lists {listed}"
    return ""
