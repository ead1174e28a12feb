"""Several processes, one decision: what the first of them says holds for all."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class FirstProcessFailed(RuntimeError):
    """The first process raised this, so that all processes stop where it does."""


def broadcast_from_process_0(value: int) -> int:
    """The first process's value (0 <= value < 2^64), on every process; also a barrier."""
    if jax.process_count() == 1:
        return value
    high, low = (int(word) for word in _broadcast(np.array([value >> 32, value & 0xFFFFFFFF], np.uint32)))
    return high << 32 | low


def call_on_process_0(call: Callable[[], Any]) -> Any:
    """What `call` returns on the first process, JSON values, on every process; the others do not call it.

    An error of the first process is raised on all, so that nobody waits for it.

    Raises:
      FirstProcessFailed: on the other processes; on the first one the error itself.
    """
    if jax.process_count() == 1:
        return call()
    error, said = None, b""
    if jax.process_index() == 0:
        try:
            said = json.dumps({"value": call()}).encode()
        except Exception as raised:
            error, said = raised, json.dumps({"error": f"{type(raised).__name__}: {raised}"}).encode()
    buffer = np.zeros(broadcast_from_process_0(len(said)), np.uint8)
    buffer[: len(said)] = np.frombuffer(said, np.uint8)
    answer = json.loads(np.asarray(_broadcast(buffer), np.uint8).tobytes())
    if error is not None:
        raise error
    if "error" in answer:
        raise FirstProcessFailed(f"the first process failed: {answer['error']}")
    return answer["value"]


def any_process(flag: bool) -> bool:
    """Whether the flag is set on some process, on every process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([flag], np.uint8))))


def _broadcast(array: np.ndarray) -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)
