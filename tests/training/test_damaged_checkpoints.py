"""A checkpoint that cannot be read is set aside, and the run goes on from the one before."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from broken import broken, deterministic, other_values
from hypothesis import given
from hypothesis import strategies as st

from dpnb.training.checkpoints import Checkpoints
from dpnb.training.state import State

LIKE = State(jnp.zeros((), jnp.int32), {"w": jnp.zeros(4)}, {"w": jnp.zeros(4)}, (), jnp.zeros(2, jnp.uint32))


def state(step: int) -> State:
    return jax.tree.map(lambda x: x + step, LIKE)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of the updates 1 and 2."""
    root = tmp_path_factory.mktemp("two")
    made = Checkpoints(root, "this one")
    for step in (1, 2):
        made.save(state(step), {"history": [{"step": step}], "stream": "s", "seconds": 1.5 * step})
    made.close()
    return root


def restored(root) -> tuple[State, dict]:
    made = Checkpoints(root, "this one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return made.restore(LIKE)
    finally:
        made.close()


def restored_step(root) -> int:
    """The update that a restored state is of; its notes are of the same."""
    found, notes = restored(root)
    step = int(found.step)
    np.testing.assert_array_equal(found.params["w"], np.full(4, step, np.float32))
    assert notes == ({"history": [{"step": step}], "stream": "s", "seconds": 1.5 * step} if step else {})
    return step


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_whole_ones(two):
    assert restored_step(two) == 2


def test_the_newest_cut_in_half(two, tmp_path):
    """Each of its files, one after another, and all of them."""
    newest = two / "checkpoints" / "2"
    for which in [
        *[[f.relative_to(newest)] for f in files(newest)],
        [f.relative_to(newest) for f in files(newest)],
    ]:
        copy = shutil.copytree(two, tmp_path / "copy")
        for name in which:
            file = copy / "checkpoints" / "2" / name
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert restored_step(copy) in (1, 2), which
        shutil.rmtree(copy)
    for name in ("extra", "state"):
        copy = shutil.copytree(two, tmp_path / "copy")
        shutil.rmtree(copy / "checkpoints" / "2" / name)
        assert restored_step(copy) == 1
        assert (copy / "damaged-checkpoint-2").is_dir()
        shutil.rmtree(copy)


def test_both_damaged_is_said(two, tmp_path):
    copy = shutil.copytree(two, tmp_path / "copy")
    for step in "12":
        shutil.rmtree(copy / "checkpoints" / step / "extra")
    with pytest.raises(ValueError, match="one of the checkpoints in .* must be readable, but none is"):
        restored(copy)


@deterministic(max_examples=15)
@given(st.data())
def test_broken_notes_are_never_taken(two, tmp_path_factory, drawn):
    """They hold the curve and the stream of random bits: as they were written, or not at all."""
    copy = shutil.copytree(two, tmp_path_factory.mktemp("broken") / "copy")
    (file,) = [f for f in files(copy / "checkpoints" / "2" / "extra") if b"fingerprint" in f.read_bytes()]
    whole = file.read_bytes()
    text = other_values(json.loads(whole)).map(lambda notes: json.dumps(notes).encode())
    file.write_bytes(drawn.draw(broken(whole) | text))
    assert restored_step(copy) in (1, 2)
