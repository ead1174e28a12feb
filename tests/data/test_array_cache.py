"""Decoded images from the cache: equal to what TFDS reads, and never of files that are not there any more."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_data import prepare_other, same

from dpnb import cache, data
from dpnb.data import DataError, array_cache, loading


@pytest.fixture
def letters(tmp_path, disk_cache):
    prepare_other(tmp_path / "tfds")
    return tmp_path / "tfds"


@pytest.fixture
def read(monkeypatch):
    """The names of the data sets that were read through TFDS."""
    names, real = [], loading._load_tfds
    monkeypatch.setattr(
        loading, "_load_tfds", lambda name, data_dir: names.append(name) or real(name, data_dir)
    )
    return names


def load(where, **more):
    return data.load("letters", data_dir=where, **more)


def test_it_is_read_once_and_is_the_same(letters, read):
    first, second = load(letters, note="a caveat"), load(letters, note="a caveat")
    assert read == ["letters"]
    same(first, second)
    with cache.unused():
        same(second, load(letters, note="a caveat"))
    assert read == ["letters"] * 2
    assert (second.name, second.classes, second.note) == ("letters", ("a", "b", "c"), "a caveat")
    assert second.train.labels.dtype == np.int32 and not second.train.images.flags.writeable
    same(load(letters, validation=2), load(str(letters), validation=2))
    (entry,) = cache.entries()
    assert (entry.kind, entry.what) == ("images", f"letters, decoded, of {letters}/letters")


def test_a_second_process_needs_no_tfds(letters):
    load(letters)
    code = f"from dpnb import data; data.load('letters', data_dir={str(letters)!r}); "
    code += "import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorflow_datasets", "array_record", "PIL"} & set(done.stdout.split())


def change_time(folder):
    path = folder / "dataset_info.json"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def change_a_byte(folder):
    """In place, with the old size and time."""
    path = folder / "features.json"
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(folder):
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def rename_a_file(folder):
    (path,) = folder.glob("*LICENSE*") if [*folder.glob("*LICENSE*")] else [folder / "more"]
    path.touch()
    path.rename(folder / "less")


@pytest.mark.parametrize("change", [change_time, change_a_byte, replace, rename_a_file])
def test_a_set_whose_files_changed_is_read_again(letters, read, change):
    load(letters)
    change(letters / "letters" / "1.0.0")
    load(letters)
    assert read == ["letters"] * 2


def test_a_set_that_was_prepared_anew_is_read_again(letters, read):
    load(letters)
    shutil.rmtree(letters)
    prepare_other(letters, splits=("train", "test", "validation"))
    assert len(load(letters).test) == 6 and read == ["letters"] * 2
    shutil.rmtree(letters)
    with pytest.raises(DataError, match="letters"):
        load(letters)


def test_a_set_that_changes_while_it_is_read_is_not_kept(letters, monkeypatch):
    real = loading._load_tfds

    def slow(name, data_dir):
        made = real(name, data_dir)
        change_time(letters / "letters" / "1.0.0")
        return made

    monkeypatch.setattr(loading, "_load_tfds", slow)
    load(letters)
    assert not cache.entries()


def test_which_of_several_versions_is_meant_is_for_tfds_to_say(letters, read):
    folder = letters / "letters"
    shutil.copytree(folder / "1.0.0", folder / "0.9.0")
    load(letters), load(letters)
    assert read == ["letters"] * 2 and not cache.entries()


def test_another_version_of_what_reads_it_reads_it_again(letters, read, monkeypatch):
    load(letters)
    for name in ("versions", "code"):
        monkeypatch.setattr(cache, name, lambda *_: "another")
        load(letters)
    assert read == ["letters"] * 3


def test_a_damaged_entry_is_made_again(letters, read):
    first = load(letters)
    (path,) = cache.entries()[0].path.glob("train_images.npy")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    same(first, load(letters))
    same(first, load(letters))
    assert read == ["letters"] * 2


def test_the_files_that_are_read_are_in_the_key():
    """Code that decides what is read belongs to the key."""
    package = pathlib.Path(array_cache.__file__).parents[1]
    assert all((package / name).is_file() for name in array_cache.CODE)
