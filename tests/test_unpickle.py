"""The restricted unpickler: arrays come back, everything else is refused before it runs."""

import contextlib
import io
import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest

from dpnb.models import unpickle

RNG = np.random.default_rng(0)
TREE = {
    "params": {
        "net/conv": {"w": RNG.normal(size=(3, 3, 2, 4)).astype(np.float32), "bias": np.arange(4.0)},
        "net/fortran": OrderedDict(w=np.asfortranarray(RNG.normal(size=(2, 3))), empty=np.zeros((0, 2))),
    },
    "network_state": {},
    "other": [np.float32(1.5), np.int64(3), np.True_, (1, 2.5, None, "text", True)],
    "big endian": np.arange(6, dtype=">i4").reshape(2, 3)[:, ::2],
    "scalar array": np.array(7, np.uint8),
}


def same(a, b):
    if isinstance(b, dict):
        return isinstance(a, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, np.ndarray):
        native = b.dtype.newbyteorder("=")
        return type(a) is np.ndarray and a.dtype == native and a.shape == b.shape and (a == b).all()
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_come_back(protocol, tmp_path):
    (tmp_path / "weights.dill").write_bytes(pickle.dumps(TREE, protocol))
    assert same(unpickle.load(tmp_path / "weights.dill"), TREE)


def test_names_of_older_numpy():
    """Weights of 2022 say numpy.core, those of today numpy._core."""
    new = pickle.dumps(TREE, 3)  # whose names are lines, which can be edited
    assert b"numpy._core" in new and same(unpickle.load(new.replace(b"numpy._core", b"numpy.core")), TREE)
    assert {module for module, _ in unpickle.ADMITTED} >= {"numpy.core.multiarray", "numpy._core.multiarray"}


class Runs:
    """Its pickle calls `function(*args)` when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


HOSTILE = {
    "a shell command": Runs(os.system, "touch hacked"),
    "eval": Runs(eval, "open('hacked', 'w')"),
    "an import": Runs(__import__, "os"),
    "attributes": Runs(getattr, "text", "upper"),
    "a class of ours": unpickle._Dtype("f4"),
    "an object array": np.array([Runs(os.system, "touch hacked"), 1], object),
    "a structured array": np.zeros(2, [("a", "f4")]),
    "text": np.array(["a", "b"]),
    "dates": np.array(["2022-04-28"], "M8[D]"),
    "a set": {1, 2},
    "bytes": b"bytes",
    "a key that is no text": {1: np.zeros(2)},
    "a function": np.sin,
    "a subclass": np.ma.array([1.0], mask=[True]),
    "a memory map's class": Runs(np.memmap, "hacked", "uint8", "w+", 0, (4,)),
    "a file": Runs(io.FileIO, "hacked", "w"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_and_nothing_runs(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        content = pickle.dumps({"params": {"w": np.zeros(2), "x": HOSTILE[name]}}, protocol)
    except Exception as error:
        pytest.skip(f"protocol {protocol} cannot write it: {error}")
    with pytest.raises(unpickle.Refused):
        unpickle.load(content)
    assert not list(tmp_path.iterdir())


def test_numpy_is_told_nothing_by_the_pickle():
    """A hostile state of dtype float32 (flags, byte order) must not reach numpy's own object."""
    honest = pickle.dumps(np.zeros(2, np.float32), 4)
    state = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"  # itemsize, alignment, flags
    hostile = honest.replace(state, state.replace(b"K\x00", b"K\x3f"))
    assert hostile != honest and any(op.name == "BUILD" for op, *_ in pickletools.genops(hostile))
    before = np.dtype(np.float32).flags
    assert same(unpickle.load(hostile), np.zeros(2, np.float32)) and np.dtype(np.float32).flags == before == 0


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(TREE)[:-40], b"\x80\x04]\x94h\x05."])
def test_damaged_files_are_refused(content):
    with pytest.raises(unpickle.Refused):
        unpickle.load(content)


def test_every_single_damaged_byte_is_refused_or_harmless():
    """Flip any byte: an error of ours, or plain values; never another exception."""
    content = pickle.dumps({"w": np.arange(3, dtype=np.float32)}, 4)
    for place in range(len(content)):
        broken = bytearray(content)
        broken[place] ^= 0xFF
        with contextlib.suppress(unpickle.Refused):
            unpickle.load(bytes(broken))
