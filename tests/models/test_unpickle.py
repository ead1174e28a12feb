"""The restricted unpickler: arrays come back, everything else is refused before it runs."""

import contextlib
import io
import os
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest

from dpnb.models.weights import conversion, unpickle

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
    "transposed": RNG.normal(size=(3, 2, 4, 5)).transpose(3, 2, 0, 1),  # neither C nor Fortran order
    "half": np.arange(3, dtype=np.float16),
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


def nested(level: int, kind):
    """Two to the power of `level` leaves in a few bytes: every container holds the one below twice."""
    content = np.zeros(2)
    for _ in range(level):
        content = {"a": content, "b": content} if kind is dict else kind((content, content))
    return pickle.dumps(content, 4)


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_shared_containers_are_seen_once(kind):
    first, second = ("a", "b") if kind is dict else (0, 1)
    loaded = unpickle.load(nested(3, kind))
    assert type(loaded) is kind and loaded[first] is loaded[second]
    assert len(nested(60, kind)) < 1000
    loaded, depth = unpickle.load(nested(60, kind)), 0
    while type(loaded) is kind:
        loaded, depth = loaded[first], depth + 1
    assert depth == 60 and same(loaded, np.zeros(2))


def test_containers_that_hold_themselves_are_refused():
    own_list, own_dict = [], {}
    own_list.append((own_list,))
    own_dict["a"] = [own_dict]
    for content in (own_list, own_dict):
        with pytest.raises(unpickle.Refused):
            unpickle.load(pickle.dumps(content, 4))


def test_too_deep_is_refused():
    with pytest.raises(unpickle.Refused):
        unpickle.load(b"\x80\x04N" + b"\x85" * 200_000 + b".")


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def text(word: str) -> bytes:
    return b"\x8c" + bytes([len(word)]) + word.encode()


FLOAT = named("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"  # dtype("f4", False, True)
ARRAY = named("numpy.core.multiarray", "_reconstruct") + b")R"
STATE = b"(K\x01K\x02\x85" + FLOAT + b"\x89C\x08" + bytes(8) + b"t"  # (1, (2,), dtype, False, 8 bytes)


def traits():
    """All that a state could change of what is shared between two calls of `load`."""
    made = {**unpickle.ADMITTED, "list": list, "dict": dict}
    return {
        name: (dict(vars(it)) if hasattr(it, "__dict__") else None, getattr(it, "__defaults__", None))
        for name, it in made.items()
    }


@pytest.mark.parametrize("state", ["dict", "slots"])
@pytest.mark.parametrize(
    "target", [*(named(*at) for at in unpickle.ADMITTED), b"}", b"]", b")", b"N", ARRAY + STATE + b"b"]
)
def test_nothing_that_is_built_is_given_a_state(target, state):
    attributes = b"}" + b"".join(text(k) + v + b"s" for k, v in (("__defaults__", b"N"), ("array", b"K\x07")))
    attributes = attributes if state == "dict" else b"N" + attributes + b"\x86"
    before = traits()
    with pytest.raises(unpickle.Refused, match="given a state"):
        unpickle.load(b"\x80\x04" + target + attributes + b"b.")
    assert traits() == before
    assert same(unpickle.load(pickle.dumps(TREE, 5)), TREE)


@pytest.mark.parametrize(
    "program",
    {
        "a class is made anew": named("numpy", "ndarray") + b")\x81",
        "with keywords": named("numpy", "ndarray") + b")}\x92",
        "an instance": b"(inumpy\nndarray\n",
        "an instance of the stack": b"(" + named("numpy", "ndarray") + b"o",
        "a registered extension": b"\x82\x01",
        "a persistent name": b"N" + b"Q",
        "a buffer from elsewhere": b"\x97",
        "a second copy": b"N2",
        "a set": b"\x8f",
        "an item of an array": ARRAY + STATE + b"bK\x00K\x01s",
        "an item of a list": b"]K\x00K\x01s",
        "appended to bytes": b"\x96\x01" + bytes(7) + b"\x00K\x00a",
        "appended to a dict": b"}K\x00a",
        "an array without bytes": ARRAY,
        "a name alone": named("numpy", "ndarray"),
        "a number of no size": ARRAY + STATE.replace(b"K\x02", b"J\xff\xff\xff\xff") + b"b",
        "a number of huge size": ARRAY + STATE.replace(b"K\x02", b"\x8a\x09" + b"\xff" * 8 + b"\x00") + b"b",
        "bytes that are not there": b"\x96" + b"\xff" * 6 + b"\x00\x00",
        "many types": named("numpy", "dtype") + text("f4,f4") + b"\x85R",
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_no_other_instruction_is_followed(program):
    with pytest.raises(unpickle.Refused):
        unpickle.load(b"\x80\x04" + program[1] + b".")


def test_the_last_place_of_the_memory_costs_nothing():
    assert unpickle.load(b"\x80\x04Nr\xff\xff\xff\x7f.") is None


def test_keys_are_looked_at_before_they_are_hashed():
    """The hash of a tuple takes as long as it is large, and as much of the stack as it is deep."""
    large = b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(60))  # x = (x, x), 60 times
    deep = b")" + b"\x85" * 200_000
    for key in (large, deep):
        in_arguments = named("collections", "OrderedDict") + b"](" + key + b"N\x86e\x85R"
        for program in (b"}" + key + b"Ns", b"}(" + key + b"Nu", in_arguments):
            with pytest.raises(unpickle.Refused):
                unpickle.load(b"\x80\x04" + program + b".")


@pytest.mark.parametrize(
    "array",
    [
        ARRAY + b"(K\x01M\xe8\x03\x85h\x01\x89h\x00tb",
        named("numpy.core.numeric", "_frombuffer") + b"(h\x00h\x01M\xe8\x03\x85" + text("C") + b"tR",
    ],
)
def test_arrays_hold_no_more_bytes_than_the_file(array):
    """One string of bytes, made into an array again and again, would fill the memory."""
    raw = b"B" + (4000).to_bytes(4, "little") + bytes(4000) + b"q\x00"
    program = b"\x80\x04(" + raw + FLOAT + b"q\x01]" + array * 3 + b"t."
    with pytest.raises(unpickle.Refused, match="no more bytes than the file"):
        unpickle.load(program)


def test_a_layer_holds_arrays():
    """What reads the tree would not see shared lists once: numpy makes them an array of every leaf."""
    for layer in ({"w": unpickle.load(nested(60, list))}, unpickle.load(nested(60, tuple)), {"w": "text"}):
        with pytest.raises(ValueError, match=r"layer 'a' must be a dict of arrays"):
            conversion.Leaves({"a": layer})
