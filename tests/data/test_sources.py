"""Photographs in folders: which are read, in which order, what is said of the rest, and their hashes."""

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from dpnb import data
from dpnb.data import DataError, hashes, photographs, sources, stand_ins
from dpnb.data.sources import FolderSource


@pytest.fixture
def root(tmp_path):
    """Two classes of four photographs to train on and of two to report on, each of a grey of its own."""
    greys = iter(range(0, 250, 10))
    for which, n in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "x" / which / name).mkdir(parents=True)
            for number in range(n):
                grey = Image.new("L", (16, 16), next(greys))
                grey.save(tmp_path / "x" / which / name / f"{number}.png")
    return tmp_path / "x"


def load(root, **more):
    return data.load(root.name, data_dir=root.parent, image_size=8, **more)


def said(root) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(root)
    return "\n".join(str(w.message) for w in caught)


def test_the_order_is_that_of_hashes_of_names(tmp_path):
    """Written out again, the plain way; runs on record depend on it."""
    names = [f"{c}/{n:03}.{s}" for c in ("a", "b-c", "b") for n in range(70) for s in ("jpg", "PNG")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    source = FolderSource(tmp_path, ("a", "b", "b-c"))
    want = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert [source.name(row) for row in range(len(source))] == want
    assert all(source[row][0] == want[row].encode() for row in (0, 7, 200))
    assert [source.classes[label] for label in source.listed.labels] == [n.split("/")[0] for n in want]
    digest, each, _ = source.content
    lines = [f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in names]
    by_path = sorted(lines, key=lambda line: line.split(" ")[0].split("/"))
    assert digest == hashlib.sha256("".join(by_path).encode()).hexdigest()
    padded = [row.ljust(32, b"\0") for row in each.tolist()]
    assert padded == [hashlib.sha256(name.encode()).digest() for name in want]


def test_hidden_files_are_no_photographs(root):
    before = load(root)
    for name in ("._0.png", ".hidden.png", ".DS_Store"):
        (root / "train/cat" / name).write_bytes((root / "train/cat/0.png").read_bytes())
    assert said(root) == "" and len(load(root).train) == 8 and load(root).fingerprint == before.fingerprint


def test_photographs_beside_the_folders_and_links_to_nowhere_are_named(root):
    Image.new("L", (9, 9)).save(root / "train" / "stray.png")
    (root / "train" / "horse").symlink_to(root / "nowhere")
    text = said(root)
    assert "2 files below" in text and "train/horse: they are no folders of a class" in text
    (root / "train" / "horse").unlink()
    assert "1 files below" in said(root) and "train/stray.png: they are no folders of a class" in said(root)


def test_only_regular_files_are_opened(root):
    """A pipe nobody writes to would be read for ever; a link to a photograph is one."""
    os.mkfifo(root / "train/cat/pipe.png")
    (root / "train/cat/broken.png").symlink_to(root / "nowhere.png")
    (root / "train/dog/folder.png").mkdir()
    (root / "val/dog/again.png").symlink_to(root / "val/dog/0.png")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(root / "val/cat")  # a socket's name must be short
        try:
            one.bind("socket.png")
        finally:
            os.chdir(here)
        text = said(root)
        assert "4 files below" in text and "train/cat/broken.png: they are no regular files" in text
        loaded = load(root)
        assert (len(loaded.train), len(loaded.test)) == (8, 5)
        assert len(loaded.fingerprint) == 64
        assert sum(len(labels) for _, labels in loaded.train.batches(4)) == 8


def test_file_names_that_are_not_utf8_work_and_can_be_shown(root):
    folder = os.fsencode(root / "train/cat")
    os.rename(folder + b"/0.png", folder + b"/caf\xe9.png")
    with open(folder + b"/broken\xe9.png", "wb") as file:
        file.write(b"no image")
    loaded = load(root)
    assert len(loaded.train) == 9 and len(loaded.fingerprint) == 64
    batch = loaded.train.read(np.arange(9, dtype=np.int32), np.ones(9, bool))
    ((_, reason),) = batch.unreadable
    assert reason == "cat/broken\\udce9.png (no image in a format that Pillow reads, 8 bytes)"
    assert load(root).fingerprint == loaded.fingerprint  # from the cache


def test_class_names_must_be_utf8(root):
    os.rename(os.fsencode(root / "train/cat"), os.fsencode(root / "train") + b"/caf\xe9")
    with pytest.raises(DataError, match=r"must be UTF-8, .* got caf\\udce9"):
        load(root)


@pytest.mark.parametrize("which", ["train", "val"])
def test_photographs_none_of_which_can_be_read_are_refused_at_once(root, which):
    files = sorted((root / which).rglob("*.png"))
    for file in files[1:]:
        file.write_bytes(b"no image")
    assert load(root)  # one is enough
    files[0].write_bytes(b"")
    split = "train" if which == "train" else "test"
    with pytest.raises(DataError, match=f"the {split} split of x none of . that were tried .*no image in a"):
        load(root)


def test_the_note_says_whether_orientation_is_obeyed(root):
    assert load(root).note == photographs.TURNED
    noted = load(root, note="from a telephone").note
    assert (
        noted == f"{photographs.TURNED}; from a telephone" == load(root, note=noted).note
    )  # as records say it


def copy(root, before: str, after: str) -> None:
    (root / after).write_bytes((root / before).read_bytes())


def test_copies_are_counted(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root).fingerprint  # all differ
    copy(root, "train/cat/0.png", "train/cat/a.png")
    copy(root, "train/cat/0.png", "train/dog/b.png")
    copy(root, "train/dog/1.png", "train/dog/c.png")
    with pytest.warns(
        UserWarning, match="3 of 11 training .* are copies of others, 1 of them under another"
    ) as w:
        assert load(root).fingerprint
    assert w[0].filename == __file__  # the line that asked, not one of a library


def test_photographs_in_both_splits_are_refused_unless_asked_for(root, monkeypatch):
    copy(root, "train/cat/0.png", "val/cat/a.png")
    loaded = load(root)
    with pytest.raises(DataError, match="got 1 of 5 of x that are copies"):
        assert loaded.fingerprint
    monkeypatch.setenv("DPNB_ALLOW_OVERLAP", "1")
    assert load(root).fingerprint and load(root).allow_overlap
    monkeypatch.delenv("DPNB_ALLOW_OVERLAP")
    allowed = photographs.load("x", 8, data_dir=root.parent, allow_overlap=True)
    assert len(allowed.fingerprint) == 64 and photographs.OVERLAP in allowed.note


def test_a_copy_may_not_be_held_out_either(root):
    """Photographs held out for tuning come from the training folder: the last ones of its order."""
    source = FolderSource(root / "train", ("cat", "dog"))
    last, first = source.name(7), source.name(0)
    assert load(root, validation=1).fingerprint
    copy(root, f"train/{last}", f"train/{first}")
    with pytest.raises(DataError, match="got 1 of 1 of x"):
        assert load(root, validation=1).fingerprint


def test_hashes_are_for_the_user_alone(root, disk_cache):
    """Also where an earlier version left an open folder."""
    folder = disk_cache / "hashes"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert load(root).fingerprint
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes == {0o600} and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a.png 1": 3}'])
def test_damaged_hashes_are_made_again(root, disk_cache, damage):
    want = load(root).fingerprint
    for file in (disk_cache / "hashes").iterdir():
        file.write_text(damage)
    assert load(root).fingerprint == want


def test_files_are_hashed_once_and_looked_at_once_for_each_list(root, disk_cache, monkeypatch):
    """By what is opened and asked for, not by the clock."""
    opened, asked = [], []
    content, key = hashes._content, hashes._key
    monkeypatch.setattr(hashes, "_content", lambda *a: [opened.append(a), content(*a)][1])
    monkeypatch.setattr(hashes, "_key", lambda *a: [asked.append(a), key(*a)][1])
    first = load(root, validation=2)
    assert first.fingerprint == first.fingerprint
    assert (len(opened), len(asked)) == (8, 8)  # one folder for both splits
    assert load(root, validation=2).fingerprint == first.fingerprint
    assert (len(opened), len(asked)) == (8, 16)


def test_large_files_are_hashed_as_small_ones(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(256)))
    want = hashlib.sha256(bytes(range(256))).hexdigest()
    assert hashes._content(str(tmp_path / "file")) == want
    monkeypatch.setattr(hashes, "SMALL", 255)
    assert hashes._content(str(tmp_path / "file")) == want


def test_files_are_read_ahead_for_the_first_hashes(tmp_path, monkeypatch):
    """As many at a time as there are threads: each waits until all of them have begun."""
    (tmp_path / "a").mkdir()
    for number in range(hashes.READERS):
        (tmp_path / "a" / f"{number}.png").write_bytes(bytes([number]))
    monkeypatch.setattr(hashes, "CHUNK", 1)
    together, content = threading.Barrier(hashes.READERS, timeout=60), hashes._content
    monkeypatch.setattr(hashes, "_content", lambda *a: [together.wait(), content(*a)][1])
    _, each, _ = FolderSource(tmp_path, ("a",)).content
    assert len(set(each.tolist())) == hashes.READERS


READER = """
import os, sys, time
import numpy as np
sys.path[:0] = sys.argv[2:]
from dpnb.data import photographs
from dpnb.privacy import sampling

if __name__ == "__main__":
    train = photographs.load("x", 64, data_dir=sys.argv[1], workers=2).train
    stream = train.stream(sampling.PoissonSampler(len(train), 0.5, seed=3), 4, slice(None), first=0)
    for _ in range(6):
        next(stream)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks Linux for processes and shared memory")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_no_process_and_no_shared_memory(root, tmp_path, how):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, str(script), str(root.parent), os.getcwd()], stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.stdout.close()
    assert len(workers) == 2 and all(map(running, workers))
    shared = set(os.listdir("/dev/shm")) - before
    assert shared
    process.send_signal(how)
    process.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until and any(map(running, workers)):
        time.sleep(0.1)
    assert not any(map(running, workers))
    while time.monotonic() < until and shared.intersection(os.listdir("/dev/shm")):
        time.sleep(0.1)
    assert not shared.intersection(os.listdir("/dev/shm"))


FLAT = """
import os, sys
sys.path[:0] = sys.argv[2:]
from dpnb.data import photographs
from dpnb.privacy import sampling

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

train = photographs.load("x", 256, data_dir=sys.argv[1]).train
stream = train.stream(sampling.PoissonSampler(len(train), 0.5, seed=3), 8, slice(None), first=0)
sizes = []
for number in range(250):
    next(stream)
    sizes.append(resident())
print(max(sizes[200:]) - max(sizes[:50]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks Linux for the memory of a process")
def test_memory_stays_flat_over_two_hundred_batches(root, tmp_path):
    """They are 300 MB together; a tenth of it is allowed for what allocators do."""
    script = tmp_path / "flat.py"
    script.write_text(FLAT)
    out = subprocess.run(
        [sys.executable, str(script), str(root.parent), os.getcwd()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(out.stdout) < 30e6
    assert 200 * 8 * 3 * 256**2 > 300e6


def test_stand_ins_have_no_copies(tmp_path):
    made = stand_ins.write_folders(data.load("digits"), tmp_path / "digits", side=40, limit=60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(made).fingerprint


def test_tfds_is_read_as_others_read_it():
    assert not sources.TfdsSource.upright and FolderSource.upright
