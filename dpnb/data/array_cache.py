"""TFDS's small images, decoded once: afterwards they are mapped into memory from the cache, without TFDS."""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from dpnb import cache
from dpnb.data.dataset import Dataset, Split

PACKAGES = ("tensorflow-datasets", "array-record", "pillow", "numpy")  # on which the decoded bytes may depend
CODE = ("data/array_cache.py", "data/dataset.py", "data/loading.py", "data/tfds.py")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def kept(name: str, data_dir, load: Callable[[str, Any], Dataset]) -> Dataset:
    """`load(name, data_dir)`, or the same from the cache.

    The entry belongs to the files of the data set: their names, sizes, inodes, and times of change. If one of
    them changes, or TFDS, or the code that reads them, they are read again. If several versions are prepared
    beside each other, which one is meant is for TFDS to say, and nothing is kept.
    """
    key = _key(name, data_dir)
    if key and (found := cache.get("images", key)):
        splits = [Split(found.arrays[f"{s}_images"], found.arrays[f"{s}_labels"]) for s in ("train", "test")]
        return Dataset(name, *splits, tuple(found.value["classes"]), found.value["note"])
    data = load(name, data_dir)
    if key and key == _key(name, data_dir):  # nobody prepared it anew meanwhile
        arrays = (data.train.images, data.train.labels, data.test.images, data.test.labels)
        value = {"classes": list(data.classes), "note": data.note}
        what = f"{name}, decoded, of {key['folder']}"
        cache.put("images", key, what, value, dict(zip(ARRAYS, arrays, strict=True)))
    return data


def _key(name: str, data_dir) -> dict[str, Any] | None:
    """What a data set is made from; None if not exactly one version of it lies in a folder of that name."""
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    folder = pathlib.Path(os.path.abspath(root), name)
    try:
        files = sorted(_listed(folder))
    except OSError:
        return None
    if sum(file[0].endswith("dataset_info.json") for file in files) != 1:
        return None
    versions, code = cache.versions(*PACKAGES), cache.code(*CODE)
    return {"name": name, "folder": str(folder), "files": files, "versions": versions, "code": code}


def _listed(folder: pathlib.Path) -> Iterator[list[Any]]:
    """Yields what identifies each file below a folder: a file that changes does not keep all of it."""
    for above, _, names in os.walk(folder):
        for path in (pathlib.Path(above, name) for name in names):
            stat = path.stat()
            times = [stat.st_mtime_ns, stat.st_ctime_ns]
            yield [str(path.relative_to(folder)), stat.st_size, stat.st_ino, *times]
