"""Answers of searches over the accountants, kept on disk. None is believed: each must hold when it is read.

`epsilon` itself is never kept on disk, so what states or verifies an epsilon computes it.
"""

import platform
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dpnb import cache

PACKAGES = ("dp-accounting", "numpy", "scipy")
CODE = tuple(f"privacy/{name}.py" for name in ("accounting", "answers", "calibration", "mechanism"))
Answer = TypeVar("Answer")


def kept(
    question: Mapping[str, Any], what: str, holds: Callable[[Answer], bool], compute: Callable[[], Answer]
) -> Answer:
    """The answer to a question: from the cache if it holds, otherwise computed and kept.

    Args:
      question: all that decides the answer; versions of the accountants and of this code are added.
      what: the question in words, for `dpnb cache`.
      holds: whether an answer may be used, by a computation that does not rest on the cache. It has to be
        right about whatever JSON can hold.
      compute: finds the answer, a number or a list of numbers.
    """
    key = {
        **question,
        "versions": cache.versions(*PACKAGES),
        "code": cache.code(*CODE),
        "python": [platform.python_version(), platform.machine()],
    }
    found = cache.get("accounting", key)
    if found is not None and holds(found.value):
        return found.value
    answer = compute()
    cache.put("accounting", key, what, answer)
    return answer
