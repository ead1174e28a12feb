"""Reads pickled arrays without running anything that the pickle brings along.

A pickle is a program, and loading one runs it.  Here it may build numpy arrays of numbers in dicts,
lists and tuples, and nothing else: any other name is refused before it is imported, and any other
instruction before it is executed.  This serves only to convert published weights once; dpnb keeps
weights as safetensors.
"""

import io
import pathlib
import pickle
import re
from typing import Any

import numpy as np


class Refused(ValueError):
    """The pickle asks for something other than arrays of numbers in plain containers."""


class _Dtype:
    """Stands in for a numpy dtype, with its code and byte order only."""

    def __init__(self, code, *options):
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d\d?", code):
            raise Refused(f"pickled arrays must hold numbers, got dtype {_shown(code)}")
        self.dtype, self.built = np.dtype(code), False

    def build(self, state):
        order = state[1]
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise Refused(f"a byte order must be one of < > = |, got {_shown(order)}")
        self.dtype, self.built = self.dtype.newbyteorder(order), True


class _Array:
    """Stands in for a numpy array until its bytes have been read."""

    def __init__(self, *subtype_shape_typecode):
        self.array: np.ndarray | None = None

    @property
    def built(self) -> bool:
        return self.array is not None

    @property
    def nbytes(self) -> int:
        return self.array.nbytes if self.built else 0

    def build(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran is True else "C")


def _array(raw, dtype, shape, order="C", axes=None) -> np.ndarray:
    """Copies bytes into an array in this machine's byte order; `order` and `axes` are numpy's own."""
    if type(dtype) is not _Dtype or not isinstance(raw, (bytes, bytearray)):
        raise Refused(f"an array must be made of numbers in bytes, got {type(raw).__name__}")
    for sizes in (shape, axes or ()):
        if type(sizes) is not tuple or not all(type(n) is int and n >= 0 for n in sizes):
            raise Refused("the shape of an array must be a tuple of sizes, got something else")
    if order == "K" and axes is not None:
        found = np.frombuffer(raw, dtype.dtype).reshape(shape).transpose(axes)
    else:
        found = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    return found.astype(dtype.dtype.newbyteorder("="), order="C")


def _number(dtype, raw) -> np.generic:
    return _array(raw, dtype, ())[()]


def _empty_dict() -> dict:
    """Stands in for OrderedDict, whose items follow; items among its arguments would be hashed unchecked."""
    return {}


def _shown(value) -> str:
    """Shows a value in an error message; printing whatever a pickle made could take for ever."""
    return repr(value[:20]) if type(value) is str else type(value).__name__


# The names that a pickle may use, each with our harmless stand-in.
ADMITTED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): _empty_dict,
}

# The instructions that a pickle may use: all that protocol 3 or later needs for arrays in plain containers.
INSTRUCTIONS = (
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD "
    "MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
)


class _Unpickler(pickle._Unpickler):  # instructions of its twin in C cannot be overridden
    """Runs only `INSTRUCTIONS`, with plain containers.

    Only what stands in for an array or a dtype is given a state, and only once. All arrays together hold no
    more bytes than the file, however often it uses the same ones.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.left = len(content)

    def find_class(self, module, name):
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise Refused(
                f"the pickle must hold numpy arrays in dicts, lists and tuples only, but asks for "
                f"{module}.{name}; if it comes from a source you trust, save its arrays as safetensors there"
            ) from None

    def load_reduce(self):
        super().load_reduce()
        self._pay()

    def load_build(self):
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) not in (_Array, _Dtype) or made.built:
            raise Refused(f"only a new array or dtype can be given a state, got {type(made).__name__}")
        made.build(state)
        self._pay()

    def _pay(self):
        self.left -= getattr(self.stack[-1], "nbytes", 0)
        if self.left < 0:
            raise Refused(
                "arrays must hold no more bytes than the file, but it uses the same ones again and again"
            )

    def load_append(self):
        self._extend([self.stack.pop()])

    def load_appends(self):
        self._extend(self.pop_mark())

    def _extend(self, items):
        if type(self.stack[-1]) is not list:
            raise Refused(f"only a list can be appended to, got {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def load_setitems(self):
        self._update(self.pop_mark())

    def _update(self, items):
        keys, made = items[::2], self.stack[-1]
        if type(made) is not dict or not all(type(k) is str for k in keys):  # before any key is hashed
            raise Refused(f"keys must be text, and of a dict, got {sorted({type(k).__name__ for k in keys})}")
        made.update(zip(keys, items[1::2], strict=True))

    def load_bytearray8(self):
        self.load_binbytes8()  # which allocates no memory beyond what is in the file
        self.append(bytearray(self.stack.pop()))


class _Instructions(dict):
    """Maps the code of an instruction to what it does, and refuses all others."""

    def __missing__(self, code):
        raise Refused(
            f"a pickle of arrays must be of protocol 3 or later, and needs no instruction {code:#04x}"
        )


_CODES = {getattr(pickle, name)[0] for name in INSTRUCTIONS.split()}
_Unpickler.dispatch = _Instructions(
    {code: getattr(_Unpickler, pickle._Unpickler.dispatch[code].__name__) for code in _CODES}
)


def load(file: str | pathlib.Path | bytes) -> Any:
    """Loads a pickle of arrays, of protocol 3 or later (long the default of pickle and dill).

    Args:
      file: path, or the bytes themselves.
    Returns:
      nested dicts (keys str), lists and tuples of numpy arrays of numbers, numbers, text and None. What the
      pickle shares is shared here too, so a small file can be a large tree.
    Raises:
      Refused: it holds or asks for anything else.
      OSError: there is no such file.
    """
    content = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
    try:
        return _plain(_Unpickler(content).load(), {})
    except Refused:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise Refused(f"the file must be a pickle of arrays, got {type(error).__name__}: {error}") from error


def _plain(value, seen: dict[int, Any]):
    """Copies `value` with its arrays in place; `seen`: every container so far, None while being copied."""
    if type(value) in (dict, list, tuple):
        if id(value) not in seen:
            seen[id(value)] = None
            if type(value) is dict:
                seen[id(value)] = {k: _plain(v, seen) for k, v in value.items()}
            else:
                seen[id(value)] = type(value)(_plain(v, seen) for v in value)
        if seen[id(value)] is None:
            raise Refused("a container must not hold itself, got one that does")
        return seen[id(value)]
    value = value.array if type(value) is _Array and value.built else value
    if value is None or isinstance(value, (np.ndarray, np.number, np.bool_, str, bool, int, float)):
        return value
    raise Refused(f"only arrays of numbers and plain values are admitted, got {type(value).__name__}")
