"""Reads pickled arrays without running anything that the pickle brings along.

A pickle is a program: loading one from elsewhere runs it.  Here it may build numpy arrays of
numbers in dicts, lists and tuples, and nothing else; whatever else it names is refused before
it is imported.  Only for converting published weights once; dpnb keeps weights as safetensors.
"""

import io
import pathlib
import pickle
from typing import Any

import numpy as np


class Refused(ValueError):
    """The pickle wants something other than arrays of numbers in plain containers."""


class _Dtype:
    """Stands in for a numpy dtype: its code and byte order, nothing that numpy would be told to do."""

    def __init__(self, code, *options):
        if not isinstance(code, str) or np.dtype(code).kind not in "biufc":
            raise Refused(f"pickled arrays must hold numbers, got dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "=", "|"):
            raise Refused(f"a byte order must be one of < > = |, got {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for a numpy array until its bytes are there."""

    array: np.ndarray | None = None

    def __init__(self, *subtype_shape_typecode):
        pass

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw, dtype, shape, order="C") -> np.ndarray:
    """A copy of bytes as an array in this machine's byte order."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise Refused(f"an array must be made of numbers in bytes, got {type(raw).__name__}")
    found = np.frombuffer(raw, dtype.dtype).reshape(shape, order=order)
    return found.astype(dtype.dtype.newbyteorder("="), order="C")


def _number(dtype, raw) -> np.generic:
    return _array(raw, dtype, ())[()]


# What a pickle may name, and our own harmless stand-in for it.
ADMITTED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): dict,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise Refused(
                f"the pickle must hold numpy arrays in dicts, lists and tuples only, but asks for "
                f"{module}.{name}; if it comes from a source you trust, save its arrays as safetensors there"
            ) from None

    def persistent_load(self, pid):
        raise Refused("the pickle must be self-contained, got a persistent reference")


def load(file: str | pathlib.Path | bytes) -> Any:
    """The content of a pickle of arrays, of protocol 3 or later (pickle's and dill's default for long).

    Args:
      file: path, or the bytes themselves.
    Returns:
      nested dicts (keys str), lists and tuples of numpy arrays of numbers, numbers, text and None.
    Raises:
      Refused: it holds or asks for anything else.  OSError: no such file.
    """
    content = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
    try:
        return _plain(_Unpickler(io.BytesIO(content)).load())
    except Refused:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise Refused(f"the file must be a pickle of arrays, got {type(error).__name__}: {error}") from error


def _plain(value):
    if isinstance(value, dict):
        if not all(type(k) is str for k in value):
            raise Refused(f"keys must be text, got {sorted({type(k).__name__ for k in value})}")
        return {k: _plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    value = value.array if type(value) is _Array else value
    if type(value) is np.ndarray:
        return value
    if value is None or isinstance(value, (str, bool, int, float, np.number, np.bool_)):
        return value
    raise Refused(f"only arrays of numbers and plain values are admitted, got {type(value).__name__}")
