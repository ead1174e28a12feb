"""Exercises that check themselves."""

from collections.abc import Callable
from typing import Any


class NoAnswer(Exception):
    """The answer, or what it returns, is still the ellipsis that stands in its place."""


def check(answer: Any, right: Callable[[Any], Any], hint: str) -> None:
    """Prints "right", "no answer yet", or "not yet" with a hint, and never raises.

    Args:
      answer: a value or a function; `...`, or a function that returns it, is no answer yet.
      right: says of the answer whether it is right; what it raises counts as not right, and is shown.
      hint: what to think of next.
    """

    def asked(*given):
        value = answer(*given)
        if value is ...:
            raise NoAnswer
        return value

    try:
        if answer is ...:
            raise NoAnswer
        good = bool(right(asked if callable(answer) else answer))
    except NoAnswer:
        return print("no answer yet")
    except Exception as error:
        good, hint = False, f"{hint} (your answer raised {error!r})"
    print("right" if good else f"not yet. Hint: {hint}")
