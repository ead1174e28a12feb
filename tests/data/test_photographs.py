"""Photographs on disk: random access, decoding, reading ahead, and what cannot be read."""

import dataclasses
import functools
import io
import os
import time

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from dpnb import data, training
from dpnb.data import DataError, Dataset, Photographs, Split, photographs, sources, stand_ins
from dpnb.data.augment import views
from dpnb.data.recipe import photographs as recipe_for
from dpnb.privacy import sampling
from dpnb.training import make_evaluate, update

SIZE = 8


def jpeg(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, format="PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Coloured:
    """`n` images of one grey value each, twice as wide as high; number `broken` is cut off."""

    n: int = 40
    broken: tuple[int, ...] = ()
    upright = True
    content = sources.Content("", np.empty(0, "S32"), np.empty(0, np.int32))

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        whole = jpeg(np.full((10, 20, 3), 5 * index))
        return (whole[:30] if index in self.broken else whole), index % 4, f"{index}.png"


def split(**changes) -> Photographs:
    source = changes.pop("source", Coloured())
    return Photographs(source, 4, SIZE, range(len(source)), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits as JPEG files in a folder of folders."""
    root = tmp_path_factory.mktemp("data") / "digits"
    return stand_ins.write_folders(data.load("digits"), root, side=40, limit=60)


def test_views_are_all_squares_inside_the_enlarged_photograph():
    """Every offset and both directions; each of the 2 x 2 x 2 kinds misses 200 draws with 1e-11."""
    recipe = recipe_for(6)
    assert recipe.enlarged == 7 and recipe_for(224).enlarged == 268
    image = np.arange(7 * 7 * 3, dtype=np.uint8).reshape(7, 7, 3)
    got = np.asarray(views(jax.random.key(0), image, 200, recipe))
    assert got.shape == (200, 6, 6, 3)
    want = {
        np.asarray(views(None, np.ascontiguousarray(crop[:, ::flip]), 0, recipe))[0].tobytes()
        for flip in (1, -1)
        for a in (0, 1)
        for b in (0, 1)
        for crop in (image[a : a + 6, b : b + 6],)
    }
    assert {view.tobytes() for view in got} == want


@pytest.mark.parametrize("rate", [0.2, 0.02])
def test_the_stream_is_what_the_sampler_draws(rate):
    """In order, update by update, also where updates draw nothing, and from any update on."""
    sampler = sampling.PoissonSampler(40, rate, seed=3)
    stream = split().stream(sampler, 4, slice(None), first=2)
    got = {}
    for step, batch in stream:
        if step >= 12:
            break
        np.testing.assert_array_equal(batch.images[batch.mask][:, 0, 0, 0], 5 * batch.indices[batch.mask])
        np.testing.assert_array_equal(batch.labels[batch.mask], batch.indices[batch.mask] % 4)
        got.setdefault(step, []).extend(batch.indices[batch.mask])
    want = {step: list(drawn) for step in range(2, 12) if len(drawn := sampler.indices(step))}
    assert got == want


@pytest.mark.slow
def test_worker_processes_give_the_same_stream():
    sampler = sampling.PoissonSampler(40, 0.3, seed=3)

    def first(workers):
        stream = split(workers=workers).stream(sampler, 4, slice(None), first=0)
        return [next(stream) for _ in range(6)]

    for (step, a), (other, b) in zip(first(0), first(2), strict=True):
        assert step == other
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x, y)


def test_reading_ahead_is_bounded():
    """A consumer that waits stops the readers: memory holds some batches, whatever the data set's size."""
    read = []

    @dataclasses.dataclass(frozen=True)
    class Counting(Coloured):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    stream = split(source=Counting(400)).stream(sampling.PoissonSampler(400, 0.5, 3), 4, slice(None), first=0)
    next(stream)
    before = -1
    while len(read) != before:  # until they stand still
        before = len(read)
        time.sleep(0.5)
    assert 4 <= before <= 4 * 4 * (len(os.sched_getaffinity(0)) + 1)


def test_parts_of_processes_make_up_the_whole():
    sampler = sampling.PoissonSampler(40, 0.3, seed=3)
    whole, left, right = (
        next(split().stream(sampler, 4, rows, first=0))[1] for rows in (slice(None), slice(0, 2), slice(2, 4))
    )
    for a, b, c in zip(whole[:4], left[:4], right[:4], strict=True):
        np.testing.assert_array_equal(a, np.concatenate([b, c]))


def test_unreadable_photographs_are_named_and_black():
    batch = split(source=Coloured(broken=(1,))).read(np.array([0, 1, 2]), np.array([True, True, False]))
    assert list(batch.labels) == [0, -1, -1]
    ((index, why),) = batch.unreadable  # padding is not read at all
    assert index == 1 and why.startswith("1.png (")
    assert not batch.images[1].any()


def test_a_disk_that_stumbles_is_asked_again(monkeypatch):
    """Twice, and then the run stops: an update that is repeated must see what it saw the first time."""
    monkeypatch.setattr(photographs.time, "sleep", lambda seconds: None)

    @dataclasses.dataclass(frozen=True)
    class Stumbling(Coloured):
        times: int = 2
        asked: list = dataclasses.field(default_factory=list)

        def __getitem__(self, index):
            self.asked.append(index)
            if len(self.asked) <= self.times:
                raise OSError("stale handle")
            return super().__getitem__(index)

    assert list(split(source=Stumbling()).read(np.array([2]), np.array([True])).labels) == [2]
    with pytest.raises(OSError, match="stale handle"):
        split(source=Stumbling(times=9)).read(np.array([2]), np.array([True]))


def test_a_label_beyond_the_classes_is_unreadable():
    batch = dataclasses.replace(split(), num_classes=2).read(np.array([1, 3]), np.ones(2, bool))
    assert list(batch.labels) == [1, -1] and "label 3 of 2 classes" in batch.unreadable[0][1]


def dataset(source) -> photographs.PhotographDataset:
    made = split(source=source)
    return photographs.PhotographDataset("coloured", made, made, tuple("abcd"), size=SIZE)


def experiment(**changes):
    return tiny.experiment(expected_batch_size=20, augmult=0, physical_batch_size=8, **changes)


def make(data):
    return update.make_trainer(experiment(), data, seed=5, model=tiny.Linear())


def one(data):
    trainer = make(data)
    return update.one_update(trainer, trainer.state)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_streamed_and_resident_photographs_give_the_same_update():
    """To the bit at K = 0, where both see the same pixels."""
    streamed = dataset(Coloured())
    recipe = streamed.recipe

    class Standardised(Dataset):
        recipe = property(lambda self: recipe_for(SIZE))

    images, labels = next(streamed.train.batches(40))
    in_memory = Split(images, labels)
    resident = Standardised("coloured", in_memory, in_memory, tuple("abcd"))
    assert resident.recipe == recipe
    assert make(resident).feed.resident and not make(streamed).feed.resident
    (a, seen_a), (b, seen_b) = one(streamed), one(resident)
    assert_equal(a.params, b.params)
    assert_equal(seen_a, seen_b)


def test_an_unreadable_photograph_is_a_zero_gradient_and_still_counts():
    """As if the sampler had not drawn it; N, q and the divisor stay."""
    drawn = sampling.PoissonSampler(40, 0.5, 5).indices(0)
    broken = int(drawn[3])
    with pytest.warns(UserWarning, match=f"image {broken} cannot be read and counts as a zero gradient"):
        with_it, seen = one(dataset(Coloured(broken=(broken,))))
    assert seen.unreadable == 1 and seen.examples == len(drawn)
    trainer = make(dataset(Coloured()))

    class Without:
        def indices(self, step):
            return drawn[drawn != broken]

    without, _ = update.one_update(dataclasses.replace(trainer, sampler=Without()), trainer.state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), with_it.params, without.params
    )


class Ten(nnx.Module):
    """192 pixels -> 10 logits."""

    def __init__(self):
        self.layer = nnx.Linear(192, 10, rngs=nnx.Rngs(0))

    def __call__(self, images):
        return self.layer(images.reshape(len(images), -1))


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(folder, tmp_path):
    """Read ahead or begun anew: the same parameters to the bit; evaluation reads the disk, too."""
    made = data.load("digits", data_dir=folder.parent, image_size=SIZE)
    e = tiny.experiment(
        dataset="digits", steps=4, expected_batch_size=12, augmult=2, physical_batch_size=4, image_size=SIZE
    )
    train = functools.partial(training.train, e, made)
    whole = train(tmp_path / "a", model=Ten())
    stopped = train(tmp_path / "b", model=Ten(), stop_at_step=2)
    assert stopped.steps == 2
    rest = train(tmp_path / "b", model=Ten())
    assert_equal(whole.params, rest.params)
    assert len(whole.raw.predictions) == 60 and whole.raw.loss == rest.raw.loss


def test_unreadable_test_photographs_count_as_wrong():
    good, bad = dataset(Coloured(8)), dataset(Coloured(8, broken=(0, 1)))
    evaluate = make_evaluate(lambda params, x: jax.numpy.tile(params, (len(x), 1)))
    always_first = jax.device_put(np.array([1.0, 0, 0, 0], np.float32))
    assert evaluate(always_first, good.test).accuracy == 25
    assert evaluate(always_first, bad.test).accuracy == 12.5


def test_a_folder_of_folders(folder):
    made = data.load("digits", data_dir=folder.parent, image_size=16, validation=10)
    assert made.classes == tuple("0123456789") and (len(made.train), len(made.test)) == (50, 10)
    assert made.shape == (16, 16, 3)
    plain = data.load("digits", data_dir=folder.parent, image_size=16)
    assert len(plain.train) == len(plain.test) == 60
    labels = np.concatenate([labels for _, labels in plain.train.batches(16)])
    np.testing.assert_array_equal(np.sort(labels), np.sort(data.load("digits").train.labels[:60]))
    assert len({*labels[:20]}) > 4  # the first ones are of many classes


def test_photographs_of_another_size_than_the_records_are_refused(folder, tmp_path):
    made = data.load("digits", data_dir=folder.parent, image_size=16)
    with pytest.raises(ValueError, match="image_size is 8, got photographs of 16 pixels"):
        training.train(tiny.experiment(dataset=made.name, image_size=8), made, tmp_path, model=Ten())
    with pytest.raises(ValueError, match="image_size is 8, got images in memory"):
        training.train(tiny.experiment(image_size=8), tiny.data(), tmp_path, model=tiny.Linear())


def test_fingerprint_sees_every_file_and_the_size(tmp_path):
    root = stand_ins.write_folders(data.load("digits"), tmp_path / "x", side=40, limit=12)

    def fingerprint(size=16, **more):
        return data.load("x", data_dir=tmp_path, image_size=size, **more).fingerprint

    before = fingerprint()
    assert before == fingerprint() != fingerprint(size=17)
    assert before != fingerprint(validation=2)
    file = sorted(root.rglob("*.jpeg"))[3]
    content = bytearray(file.read_bytes())
    content[-20] ^= 1  # the same size, another content
    times = file.stat()
    file.write_bytes(content)
    os.utime(
        file, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # and the same time of change, as far as it can be set
    assert fingerprint() != before
    file.write_bytes(bytes(content[:-20]) + bytes([content[-20] ^ 1]) + bytes(content[-19:]))
    assert fingerprint() == before
    (root / "train" / ".hidden").mkdir()
    assert fingerprint() == before
    for which in ("train", "val"):
        (root / which / "00").mkdir()  # every label moves by one
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"x/train/CLASS/IMAGE, and there is no such folder"),
        (lambda root: (root / "x/train/a").mkdir(parents=True), "needs a folder val"),
        (
            lambda root: [(root / f"x/{p}").mkdir(parents=True) for p in ("train/a", "val/b")],
            "classes of .* must be those of train",
        ),
        (
            lambda root: [(root / f"x/{p}").mkdir(parents=True) for p in ("train/a", "val/a")],
            "needs photographs in its train split",
        ),
    ],
)
def test_folders_that_are_no_data_set(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        data.load("x", data_dir=tmp_path, image_size=16)


def test_folders_say_what_is_missing_and_what_is_not_read(tmp_path):
    """Classes without photographs, files of other kinds; a folder asked for as images in memory."""
    root = stand_ins.write_folders(data.load("digits"), tmp_path / "x", side=40, limit=12)
    for file in (root / "val" / "3").iterdir():
        file.unlink()
    (root / "train" / "4" / "notes.txt").write_text("no photograph")
    with pytest.warns() as said:
        made = data.load("x", data_dir=tmp_path, image_size=16)
    said = "\n".join(str(w.message) for w in said)
    assert "are not tested: " in said and "val has no photograph of" in said and "'3'" in said
    assert "1 files below" in said and "such as train/4/notes.txt: photographs end in .jpeg" in said
    assert len(made.train) == 12 and len(made.classes) == 10
    with pytest.raises(DataError, match="x/train is a folder: photographs are read with image_size"):
        data.load("x", data_dir=tmp_path)


def test_bitmaps_and_gifs_are_photographs_too(tmp_path):
    for which in ("train", "val"):
        (tmp_path / "x" / which / "a").mkdir(parents=True)
        for suffix in ("bmp", "gif", "tiff", "png"):
            Image.new("RGB", (20, 20), "red").save(tmp_path / "x" / which / "a" / f"{suffix}.{suffix}")
    made = data.load("x", data_dir=tmp_path, image_size=16)
    ((images, labels),) = made.train.batches(8)
    assert len(made.train) == 4 and set(labels) == {0}
    assert np.abs(images.astype(int) - [255, 0, 0]).max() <= 2


def test_stand_ins_are_written_once(tmp_path):
    assert stand_ins.write_stand_ins("digits", tmp_path / "p") == tmp_path / "p"
    files = sorted((tmp_path / "p").rglob("*.jpeg"))
    times = [file.stat().st_mtime_ns for file in files]
    stand_ins.write_stand_ins("digits", tmp_path / "p")
    assert len(files) == 400 + 297 and times == [file.stat().st_mtime_ns for file in files]


def test_array_files_are_refused_as_photographs(tmp_path):
    with pytest.raises(DataError, match="stay on disk"):
        data.load("x", file=tmp_path / "x.npz", image_size=16)
