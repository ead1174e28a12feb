"""dpnb.data: validation, files, digits, and CIFAR through TFDS without TensorFlow.

The archives are miniatures in CIFAR's own binary format, downloaded over HTTP on loopback by
TFDS's own download manager.  Set DPNB_DATA_DIR to a TFDS directory with the whole CIFAR-10
prepared to run the tests that need it.  Nothing here is random but for fixed seeds.
"""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import shared_runs
from broken import broken, deterministic, other_values
from hypothesis import given
from hypothesis import strategies as st

from dpnb import data
from dpnb.data import DataError, Dataset, Split, __main__


def images(n, seed=0, shape=(32, 32, 3)):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape)).astype(np.uint8)


def tiny(n=12, classes=10, note=""):
    train, test = (Split(images(k, k), np.arange(k) % classes) for k in (n, 5))
    return Dataset("cifar10", train, test, tuple(f"class {i}" for i in range(classes)), note)


def same(a: Dataset, b: Dataset):
    for x, y in ((a.train, b.train), (a.test, b.test)):
        np.testing.assert_array_equal(x.images, y.images)
        np.testing.assert_array_equal(x.labels, y.labels)
    assert (a.classes, a.note, a.fingerprint) == (b.classes, b.note, b.fingerprint)


# Splits and data sets


@pytest.mark.parametrize(
    ("pictures", "labels", "says"),
    [
        (images(3).astype(np.float32), np.zeros(3, int), "uint8 .n, h, w, 3., got float32 .3, 32, 32, 3."),
        (images(3)[0], np.zeros(3, int), "got uint8 .32, 32, 3."),
        (images(3).transpose(0, 3, 1, 2), np.zeros(3, int), "channels come last"),
        (images(3)[..., :1], np.zeros(3, int), "got uint8 .3, 32, 32, 1."),
        (images(3), np.zeros(4, int), "integers .3., one for each image, got int64 .4."),
        (images(3), np.zeros((3, 10), int), "argmax"),
        (images(3), np.zeros(3), "got float64"),
        (images(3), np.full(3, 2**32), "fit int32"),
        (images(0), np.zeros(0, int), "at least one image"),
    ],
)
def test_a_split_refuses_wrong_arrays(pictures, labels, says):
    with pytest.raises(DataError, match=says):
        Split(pictures, labels)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_are_in_range(label):
    good, bad = Split(images(2), np.zeros(2, int)), Split(images(2), np.array([0, label]))
    for train, test, which in ((bad, good, "train"), (good, bad, "test")):
        with pytest.raises(DataError, match=f"0 to 9 .* in the {which} split"):
            Dataset("x", train, test, tuple("0123456789"))


def test_train_and_test_images_have_one_shape():
    with pytest.raises(DataError, match="one shape"):
        Dataset("x", Split(images(2), [0, 0]), Split(images(2, shape=(16, 16, 3)), [0, 0]), ("a",))


def test_arrays_are_int32_and_read_only():
    split = Split(images(2), np.zeros(2, np.uint8))
    assert split.labels.dtype == np.int32 and len(split) == 2
    for array in (split.images, split.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_the_fingerprint_sees_everything_that_counts():
    base = tiny()
    x, y = base.train.images, base.train.labels
    pixel, label = x.copy(), y.copy()
    pixel[3, 5, 7, 1] ^= 1
    label[4] = (label[4] + 1) % 10
    order = np.r_[1, 0, 2 : len(x)]
    changed = [
        Split(pixel, y), Split(x, label), Split(x[order], y[order]), Split(x[:-1], y[:-1]),
    ]  # fmt: skip
    sets = [base, *(Dataset("cifar10", c, base.test, base.classes) for c in changed)]
    sets += [Dataset("cifar10", base.test, base.train, base.classes)]
    assert len({s.fingerprint for s in sets}) == len(sets)
    assert tiny(note="other").fingerprint == base.fingerprint
    assert len(base.fingerprint) == 64 and base.fingerprint is base.fingerprint  # cached


# load, save, files


def test_file_round_trip(tmp_path):
    path = tmp_path / "new" / "x.npz"
    data.save(tiny(note="a caveat"), path)
    same(data.load("cifar10", file=path), tiny(note="a caveat"))
    assert data.load("cifar10", file=str(path), note="another").note == "a caveat; another"
    assert data.load("cifar10", file=path, note="a caveat").note == "a caveat"
    assert data.load("my own", file=path).name == "my own"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    data.save(tiny(), path)

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        data.save(tiny(n=9), path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    same(data.load("cifar10", file=path), tiny())


def test_validation_holds_out_the_last_training_images(tmp_path):
    path = tmp_path / "x.npz"
    data.save(tiny(), path)
    held, whole = data.load("cifar10", file=path, validation=4), tiny()
    np.testing.assert_array_equal(held.train.images, whole.train.images[:8])
    np.testing.assert_array_equal(held.train.labels, whole.train.labels[:8])
    np.testing.assert_array_equal(held.test.images, whole.train.images[8:])
    np.testing.assert_array_equal(held.test.labels, whole.train.labels[8:])
    assert held.fingerprint != whole.fingerprint
    for wrong in (-1, 12, 13):
        with pytest.raises(DataError, match=f"0 to 11, got {wrong}"):
            data.load("cifar10", file=path, validation=wrong)


def write(path, **change):
    arrays = dict(
        train_images=images(3), train_labels=np.arange(3), test_images=images(2), test_labels=np.arange(2),
        classes=np.array(list("0123456789")), note=np.array(""),
    )  # fmt: skip
    arrays |= change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(note=None, classes=None), "lacks the arrays classes, note; write it with: python -m dpnb.data"),
        (dict(train_images=images(3).astype(float)), "uint8"),
        (dict(train_labels=np.arange(4)), "one for each image"),
        (dict(test_labels=np.array([0, 10])), "0 to 9 .* got 0 to 10 in the test split"),
        (dict(test_images=images(0), test_labels=np.arange(0)), "at least one image"),
        (dict(classes=np.array(["a", "b", "c"])), "cifar10 has 10 classes, .* has 3"),
        (dict(train_labels=np.array([0, None, "x"], object)), "not a readable .npz"),  # never unpickled
    ],
)
def test_malformed_files(tmp_path, change, says):
    write(tmp_path / "x.npz", **change)
    with pytest.raises(DataError, match=says):
        data.load("cifar10", file=tmp_path / "x.npz")


def test_unreadable_files(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(DataError, match=r"no array file .*python -m dpnb.data cifar10 --data-dir DIR --npz"):
        data.load("cifar10", file=path)
    write(path)
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"", b"text", whole[: len(whole) // 2], (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a readable .npz"):
            data.load("cifar10", file=path)


def test_unknown_name():
    with pytest.raises(DataError, match="cifar10, cifar100, digits"):
        data.load("no-such-data-set")


def test_files_need_neither_tfds_nor_sklearn(tmp_path):
    data.save(tiny(), tmp_path / "x.npz")
    code = """
        import sys
        for name in ("tensorflow_datasets", "tensorflow", "array_record", "sklearn", "PIL", "requests"):
            sys.modules[name] = None  # importing it now raises ImportError
        from dpnb import data
        print(data.load("cifar10", file=sys.argv[1]).fingerprint)
        for name in ("cifar10", "digits"):
            try:
                data.load(name)
            except data.DataError as error:
                print(error)
        try:
            data.prepare("cifar10", "nowhere")
        except data.DataError as error:
            print(error)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.npz"],
        env=os.environ | {"PYTHONPATH": str(shared_runs.ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    fingerprint, cifar, digits, prepare = run.stdout.splitlines()
    assert fingerprint == tiny().fingerprint
    assert "pip install tensorflow-datasets" in cifar and "pip install tensorflow-datasets" in prepare
    assert "pip install scikit-learn" in digits


# digits


def test_digits_are_embedded_and_fixed():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    assert digits.train.images.shape == (1500, 32, 32, 3) and digits.test.images.shape == (297, 32, 32, 3)
    assert digits.classes == tuple("0123456789")
    assert np.bincount(digits.train.labels).min() > 130 and np.bincount(digits.test.labels).min() > 15
    # The exact bytes, so that results stay comparable across versions and machines.
    assert digits.fingerprint == "5757d926d2f2fcb2332ae13a0cc1290cefda561ec0503d0e4f0f971c8aafcafa"
    held = data.load("digits", validation=300)
    assert (len(held.train), len(held.test)) == (1200, 300)


def test_digits_can_be_told_apart():
    """A nearest-neighbour rule on ink (pixel minus paper) reads above 95 % of the test digits."""
    pytest.importorskip("sklearn")
    digits = data.load("digits")

    def ink(split):
        grey = split.images.astype(np.float32).mean(-1).reshape(len(split), -1)
        grey -= grey.min(1, keepdims=True)
        return grey / grey.max(1, keepdims=True)

    train, test = ink(digits.train), ink(digits.test)
    distance = (train**2).sum(1)[None] - 2 * test @ train.T
    assert (digits.train.labels[distance.argmin(1)] == digits.test.labels).mean() > 0.95


def test_command_line(tmp_path, capsys):
    pytest.importorskip("sklearn")
    __main__.main(["digits", "--npz", str(tmp_path / "d.npz"), "--note", "mind this"])
    out = capsys.readouterr().out
    saved = data.load("digits", file=tmp_path / "d.npz")
    assert saved.note == "mind this" and saved.fingerprint in out and "1500 train, 297 test" in out


# CIFAR through TFDS


class Archive:
    """A miniature of CIFAR's binary archive; what it holds is in `.splits` and `.names`."""

    def __init__(self, name, n_train=30, n_test=11):
        random = np.random.RandomState(len(name))
        self.names = [f"{name} class {i}" for i in range(data.CLASSES[name])]
        self.splits, records = {}, {}
        for split, n in (("train", n_train), ("test", n_test)):
            pictures, labels = images(n, n), random.randint(0, len(self.names), n)
            self.splits[split] = (pictures, labels)
            columns = [labels] if name == "cifar10" else [random.randint(0, 20, n), labels]  # coarse first
            planes = pictures.transpose(0, 3, 1, 2).reshape(n, 3072)  # red plane, green plane, blue plane
            records[split] = np.concatenate([np.stack(columns, 1).astype(np.uint8), planes], 1)
        if name == "cifar10":
            prefix, batches = "cifar-10-batches-bin/", np.split(records["train"], 5)
            files = {f"data_batch_{i + 1}.bin": b for i, b in enumerate(batches)}
            files |= {"test_batch.bin": records["test"], "batches.meta.txt": self.names}
        else:
            prefix = "cifar-100-binary/"
            coarse = [f"coarse {i}" for i in range(20)]
            files = {"train.bin": records["train"], "test.bin": records["test"]}
            files |= {"fine_label_names.txt": self.names, "coarse_label_names.txt": coarse}
        self.files = {
            prefix + k: v.tobytes() if isinstance(v, np.ndarray) else "\n".join([*v, "", ""]).encode()
            for k, v in files.items()
        }

    def tar(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            folder = tarfile.TarInfo(next(iter(self.files)).split("/")[0])
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, content in reversed(self.files.items()):  # in an order of its own
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return out.getvalue()


class WithoutTensorFlow:
    """An import finder that does not find TensorFlow, even where it is installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] == "tensorflow" else self.finder.find_spec(name, *args)


class Server:
    """Serves archives on loopback in place of CIFAR's home; TFDS knows their checksums."""

    def __init__(self, folder, monkeypatch):
        cifar = pytest.importorskip("tensorflow_datasets.image_classification.cifar")
        self.folder, self.patch = folder, monkeypatch
        folder.mkdir()
        handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        self.http = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
        )
        self.running = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        if "tensorflow" in sys.modules:
            pytest.skip("TensorFlow is loaded already and cannot be hidden")
        monkeypatch.setattr(sys, "meta_path", [WithoutTensorFlow(finder) for finder in sys.meta_path])
        for cls in (cifar.Cifar10, cifar.Cifar100):
            info = cls._cifar_info.fget

            def local(builder, info=info):
                known = info(builder)
                return known._replace(url=self.url(known.url))

            monkeypatch.setattr(cls, "_cifar_info", property(local))

    def url(self, original):
        return f"http://127.0.0.1:{self.http.server_port}/{original.rsplit('/', 1)[-1]}"

    def put(self, name, content, folder=None, registered=None):
        """Offer `content`, or place it in `folder` instead; its checksum becomes the known one."""
        from tensorflow_datasets.core.download import checksums
        from tensorflow_datasets.core.utils import Size

        file = f"cifar-{name.removeprefix('cifar')}-binary.tar.gz"
        folder = folder or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
        registered = content if registered is None else registered
        known = checksums.UrlInfo(Size(len(registered)), hashlib.sha256(registered).hexdigest(), file)
        self.patch.setitem(checksums.get_all_url_infos(), self.url(file), known)

    def stop(self):
        if self.running:
            self.running = False
            self.http.shutdown()
            self.http.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server(tmp_path / "www", monkeypatch)
    yield server
    server.stop()


def tfds_order(split, n):
    """TFDS writes examples by the hash of their key: for CIFAR the index in the archive."""
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    return sorted(range(n), key=hasher.hash_key)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_download_prepare_load_without_tensorflow(name, server, tmp_path, capsys):
    archive = Archive(name)
    server.put(name, archive.tar())
    where = data.prepare(name, tmp_path / "tfds")
    assert sorted(where.glob("*.array_record*")) and where.is_relative_to(tmp_path / "tfds" / name)
    server.stop()
    assert data.prepare(name, tmp_path / "tfds") == where  # done already: no network needed
    loaded = data.load(name, data_dir=tmp_path / "tfds")
    for split, found in (("train", loaded.train), ("test", loaded.test)):
        pictures, labels = archive.splits[split]
        order = tfds_order(split, len(labels))
        assert order != sorted(order)
        np.testing.assert_array_equal(found.images, pictures[order])
        np.testing.assert_array_equal(found.labels, labels[order])
    assert loaded.classes == tuple(archive.names) and loaded.name == name

    __main__.main([name, "--data-dir", str(tmp_path / "tfds"), "--npz", str(tmp_path / "x.npz")])
    assert "30 train, 11 test" in capsys.readouterr().out
    same(data.load(name, file=tmp_path / "x.npz"), loaded)


def test_the_order_is_that_of_tfds_everywhere():
    """TFDS's published CIFAR-10 starts with the training image number 16399."""
    pytest.importorskip("tensorflow_datasets")
    assert tfds_order("train", 50_000)[0] == 16399


def test_not_prepared_says_what_to_run(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    command = f"python -m dpnb.data cifar100 --data-dir {tmp_path}"
    with pytest.raises(DataError, match=f"not prepared in .*run: {command}"):
        data.load("cifar100", data_dir=tmp_path)
    with pytest.raises(DataError, match="only cifar10 and cifar100"):
        data.prepare("digits", tmp_path)


def test_a_notebook_downloads_what_is_missing_once(server, tmp_path, capsys):
    """It says what, how large and where to; the second time nothing is said or asked for."""
    from dpnb import notebook

    archive = Archive("cifar10").tar()
    server.put("cifar10", archive)
    given = dict(data_dir=str(tmp_path / "tfds"), instead="not this")
    loaded = notebook.fetch("cifar10", **given)
    said = capsys.readouterr().out
    assert (
        f"downloading {server.url('cifar-10-binary.tar.gz')}, {len(archive) / 1e6:.0f} MB, to {tmp_path / 'tfds'}, once"
        in said
    )
    server.stop()
    same(notebook.fetch("cifar10", **given), loaded)
    assert not capsys.readouterr().out


def test_a_notebook_without_data_and_network_goes_on_or_fails(server, tmp_path, capsys):
    """As it was asked to: with nothing, with embedded data at the two small presets, or not at all."""
    from dpnb import experiments, notebook

    server.stop()
    where = dict(data_dir=str(tmp_path / "tfds"))
    assert notebook.fetch("cifar10", **where, instead="records are shown") is None
    assert (
        "no network" in (said := capsys.readouterr().out) and "not on this machine: records are shown" in said
    )
    with pytest.raises(data.Unreachable, match="no network"):
        notebook.fetch("cifar10", **where)
    for preset in ("smoke", "teach"):
        e, loaded = notebook.or_embedded(experiments.get("cifar10/wrn-16-4/eps8", preset), **where)
        assert (
            e.dataset == loaded.name == "digits" and e.paper_mean is None and "on cifar10" in e.paper_source
        )
    for e, place in (
        (experiments.get("cifar10/wrn-16-4/eps8", "paper"), ""),
        (experiments.get("cifar10/wrn-16-4/eps8", "smoke"), "out"),
    ):
        with pytest.raises(data.Unreachable, match="no network"):
            notebook.or_embedded(e, place, **where)
    (tmp_path / "broken.npz").write_text("no array file")
    with pytest.raises(DataError, match="not a readable"):
        notebook.fetch("cifar10", file=str(tmp_path / "broken.npz"), instead="not this")


def test_no_network_says_so_at_once(server, tmp_path):
    server.stop()
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no network .*downloads/manual/cifar-10-binary.tar.gz"):
        data.prepare("cifar10", tmp_path / "tfds")
    assert time.monotonic() - start < 15
    with pytest.raises(SystemExit, match="error: no network"):
        __main__.main(["cifar10", "--data-dir", str(tmp_path / "tfds")])


def test_an_archive_placed_by_hand_needs_no_network(server, tmp_path):
    archive = Archive("cifar10")
    server.put("cifar10", archive.tar(), tmp_path / "tfds" / "downloads" / "manual")
    server.stop()
    data.prepare("cifar10", tmp_path / "tfds")
    assert data.load("cifar10", data_dir=tmp_path / "tfds").classes == tuple(archive.names)


def test_downloads_that_fail(server, tmp_path):
    with pytest.raises(DataError, match="download failed .*404.*manual"):
        data.prepare("cifar10", tmp_path / "missing")
    whole = Archive("cifar10").tar()
    server.put("cifar10", whole[:-100], registered=whole)
    with pytest.raises(DataError, match="incomplete or not the known one"):
        data.prepare("cifar10", tmp_path / "checksum")
    server.put("cifar10", whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        data.prepare("cifar10", tmp_path / "damaged")
    broken = Archive("cifar10")
    broken.files["cifar-10-batches-bin/data_batch_3.bin"] += b"?"
    server.put("cifar10", broken.tar())
    with pytest.raises(DataError, match="data_batch_3.bin must be whole records of 3073 bytes"):
        data.prepare("cifar10", tmp_path / "records")
    del broken.files["cifar-10-batches-bin/data_batch_3.bin"]
    server.put("cifar10", broken.tar())
    with pytest.raises(DataError, match="must hold cifar-10-batches-bin/data_batch_3.bin"):
        data.prepare("cifar10", tmp_path / "member")
    with pytest.raises(DataError, match="not prepared"):  # nothing half prepared is left
        data.load("cifar10", data_dir=tmp_path / "records")


def test_damaged_or_foreign_directories(server, tmp_path):
    server.put("cifar10", Archive("cifar10").tar())
    where = data.prepare("cifar10", tmp_path / "tfds")
    [records] = where.glob("*-train.array_record*")
    whole = records.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        records.write_bytes(content)
        with pytest.raises(DataError, match="is damaged .*delete that directory, then run: python -m"):
            data.load("cifar10", data_dir=tmp_path / "tfds")
    records.write_bytes(whole)
    info = json.loads((where / "dataset_info.json").read_text())
    (where / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="only TensorFlow reads"):
        data.load("cifar10", data_dir=tmp_path / "tfds")


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A prepared set of 6 + 6 images, which nobody changes."""
    root = tmp_path_factory.mktemp("letters")
    prepare_other(root)
    return root / "letters"


def listing(k, **changed):
    """Changes what `dataset_info.json` says of its k-th split."""
    return lambda info: {
        **info,
        "splits": [s | changed if i == k else s for i, s in enumerate(info["splits"])],
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (listing(0, shardLengths=["5"]), "train.*holds 6 examples, and dataset_info.json lists 5"),
        (listing(0, shardLengths=["7"]), "train.*holds 6 examples, and dataset_info.json lists 7"),
        (listing(1, shardLengths=["2"]), "validation.*holds 6 examples, and dataset_info.json lists 2"),
        (listing(0, shardLengths=["3", "3"]), "letters-train.array_record-00000-of-00002 is missing"),
        (listing(0, shardLengths=[]), "does not say how many examples train has"),
        (lambda info: info | {"splits": []}, "lists no examples"),
        (lambda info: info | {"name": "numbers"}, "numbers-train.array_record-00000-of-00001 is missing"),
        (lambda info: [], "not that of this data set, or cannot be read"),
        (lambda info: {}, "not that of this data set, or cannot be read"),
        (lambda info: None, "has no dataset_info.json|dataset_info.json is not that of"),
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_listing_that_is_not_of_its_files(letters, tmp_path, change, why):
    """Never loaded short: the folder is named as damaged."""
    shutil.copytree(letters, tmp_path / "letters")
    (path,) = (tmp_path / "letters").rglob("dataset_info.json")
    if isinstance(change, bytes):
        path.write_bytes(change)
    elif (made := change(json.loads(path.read_text()))) is None:
        path.unlink()
    else:
        path.write_text(json.dumps(made))
    with pytest.raises(
        DataError, match=rf"{path.parent} is damaged \(.*{why}.*\); delete that directory, then run"
    ):
        data.load("letters", data_dir=tmp_path)


@deterministic(max_examples=30)
@given(st.data())
def test_a_broken_listing_is_never_loaded_short(letters, drawn):
    """Cut, with bits flipped, with other values: the whole data set, or a `DataError`."""
    (path,) = letters.rglob("dataset_info.json")
    whole = path.read_bytes()
    text = other_values(json.loads(whole)).map(lambda info: json.dumps(info).encode())
    try:
        path.write_bytes(drawn.draw(broken(whole) | text))
        found = data.load("letters", data_dir=letters)
        assert (len(found.train), len(found.test)) == (6, 6)
    except DataError:
        pass
    finally:
        path.write_bytes(whole)


def test_cifar_without_its_listing_is_damaged(server, tmp_path):
    """TFDS knows this set by itself, and would say that it is empty."""
    server.put("cifar10", Archive("cifar10").tar())
    where = data.prepare("cifar10", tmp_path / "tfds")
    text = (where / "dataset_info.json").read_text()
    for content in ("", text[:200], "[]", None):
        (where / "dataset_info.json").unlink() if content is None else (
            where / "dataset_info.json"
        ).write_text(content)
        with pytest.raises(DataError, match=f"{where} is damaged .*dataset_info.json"):
            data.load("cifar10", data_dir=tmp_path / "tfds")


@pytest.fixture(scope="module")
def cifar10():
    where = os.environ.get("DPNB_DATA_DIR")
    if not where:
        pytest.skip("set DPNB_DATA_DIR to a TFDS directory with CIFAR-10 prepared")
    start = time.monotonic()
    return data.load("cifar10", data_dir=where), time.monotonic() - start


def test_the_whole_cifar10(cifar10):
    """Counts, classes, statistics; and loading takes well under a minute."""
    from dpnb.data import recipe

    whole, seconds = cifar10
    assert whole.train.images.shape == (50_000, 32, 32, 3) and whole.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(whole.train.labels).tolist() == [5000] * 10
    assert np.bincount(whole.test.labels).tolist() == [1000] * 10
    assert whole.classes == data.CIFAR10_CLASSES
    np.testing.assert_allclose(whole.train.images.mean((0, 1, 2)) / 255, recipe.MEAN, atol=1e-4)
    np.testing.assert_allclose(whole.train.images.std((0, 1, 2), dtype=float) / 255, recipe.STD, atol=5e-4)
    assert seconds < 60


def prepare_other(root, name="letters", splits=("train", "validation"), shape=(12, 12, 3)):
    """A TFDS directory of another set, made by a builder that the reader does not have."""
    import io

    from PIL import Image

    tfds = pytest.importorskip("tensorflow_datasets")
    images = np.random.default_rng(0).integers(0, 256, (len(splits), 6, 12, 12, 3), np.uint8)

    class Letters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(i) for i, split in enumerate(splits)}

        def _generate_examples(self, i):
            for n, pixels in enumerate(images[i]):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, format="PNG")
                png.seek(0)
                yield n, {"image": png, "label": n % 3}

    Letters.name, Letters.code_path = name, None
    Letters(data_dir=root, file_format="array_record").download_and_prepare()
    return images


def test_any_set_that_tfds_finds_below_the_directory(tmp_path):
    """As public data to pre-train on: read without its builder, reported on its validation split."""
    images = prepare_other(tmp_path)
    found = data.load("letters", data_dir=tmp_path)
    assert found.classes == ("a", "b", "c")
    for split, made in ((found.train, images[0]), (found.test, images[1])):
        assert {(i.tobytes(), int(y)) for i, y in zip(split.images, split.labels, strict=True)} == {
            (i.tobytes(), n % 3) for n, i in enumerate(made)
        }


@pytest.mark.parametrize(
    ("form", "says"),
    [(dict(shape=(None, None, 3)), "one size"), (dict(splits=("train",)), "test or validation split")],
)
def test_sets_of_another_form_are_refused(tmp_path, form, says):
    prepare_other(tmp_path, **form)
    with pytest.raises(DataError, match=f"letters .*{says}"):
        data.load("letters", data_dir=tmp_path)
