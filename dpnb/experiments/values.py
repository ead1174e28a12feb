"""What a field of an experiment may hold: its type, its bounds, and the one form in which it is kept.

The same number always has the same form, whatever it came as (2, 2.0, `numpy.float32(2)`): fingerprints and
names of folders are made of it.
"""

import math
import numbers
import os
import typing
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import numpy as np

INT32 = 2**31 - 1  # counters on devices


class Range(NamedTuple):
    """An interval of numbers; NaN is in none.

    ends: "[" or "(" and "]" or ")", as in mathematics.
    infinite: infinity belongs to it, too.

    >>> print(Range(0, 1, "()"), 0 in Range(0, 1, "()"), Range(1, 1000, infinite=True), Range(0, 1e38))
    (0, 1) False [1, 1000] or inf [0, 1e+38]
    """

    low: float
    high: float
    ends: str = "[]"
    infinite: bool = False

    def __contains__(self, number: Any) -> bool:
        if self.infinite and number == math.inf:
            return True
        above = number > self.low or (self.ends[0] == "[" and number == self.low)
        return above and (number < self.high or (self.ends[1] == "]" and number == self.high))

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low:.15g}, {self.high:.15g}{self.ends[1]}" + " or inf" * self.infinite


def canonical(value: Any, annotation: Any, allowed: Container | None = None) -> Any:
    """Returns the value in the one form in which a field keeps it.

    Args:
      value: whatever a user gave.
      annotation: of the field: bool, str, int (whole numbers, also 1e3 and 16.0), float, or int | float (whole
        numbers are kept as int); each also with "| None".
      allowed: a `Range` of numbers, or the texts that there are; None for any.
    Raises:
      ValueError: it is of another type or not allowed; the message says what must hold.

    >>> canonical(1e3, int), canonical(2, float), canonical(np.float32(4), int | float)
    (1000, 2.0, 4)
    """
    types = typing.get_args(annotation) or (annotation,)
    for kind in types:
        made = _READ[kind](value)
        if made is not _NO and (made is None or allowed is None or made in allowed):
            return made
    words = [_WORDS[kind] for kind in types if (int, float) != (kind, types[-1])]
    if isinstance(allowed, Range):
        words[0] += f" in {allowed}"
    elif allowed is not None:
        words[0] = f"one of {tuple(allowed)}"
    hint = '; "" for none' if value is None and types == (str,) else ""
    raise ValueError(f"must be {' or '.join(words)}, got {_shown(value)}{hint}")


def _shown(value: Any) -> str:
    """Formats what came, of any length."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]} ..."


_NO = object()  # not of this type


def _bool(value: Any) -> Any:
    return bool(value) if isinstance(value, (bool, np.bool_)) else _NO


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, (str, os.PathLike)) else _NO


def _whole(value: Any) -> Any:
    if _bool(value) is not _NO or not isinstance(value, numbers.Real):
        return _NO
    if isinstance(value, numbers.Integral):  # as it is: a long seed is more than a float can hold
        return int(value)
    return int(value) if math.isfinite(value) and value == int(value) else _NO


def _number(value: Any) -> Any:
    if _bool(value) is not _NO or not isinstance(value, numbers.Real):
        return _NO
    try:
        return float(value)
    except OverflowError:  # a whole number beyond all floats
        return _NO


def _none(value: Any) -> Any:
    return None if value is None else _NO


_READ: dict[Any, Callable[[Any], Any]] = {
    bool: _bool, str: _text, int: _whole, float: _number, type(None): _none,
}  # fmt: skip
_WORDS = {bool: "True or False", str: "text", int: "a whole number", float: "a number", type(None): "None"}
