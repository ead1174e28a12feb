"""Decisions of several processes: process 0 decides and broadcasts to all."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class FirstProcessFailed(RuntimeError):
    """Process 0 failed with this error; all other processes raise it, and stop too."""


def broadcast_from_process_0(value: int) -> int:
    """Broadcasts a value of process 0 (0 <= value < 2^64) to every process; also a barrier."""
    if jax.process_count() == 1:
        return value
    high, low = (int(word) for word in _broadcast(np.array([value >> 32, value & 0xFFFFFFFF], np.uint32)))
    return high << 32 | low


def call_on_process_0(call: Callable[[], Any]) -> Any:
    """Calls `call` on process 0 only, and returns its result (JSON values) on every process.

    An error on process 0 is raised on all, so that no process waits for it.

    Raises:
      FirstProcessFailed: on the other processes; process 0 raises the error itself.
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
    """Returns, on every process, whether the flag is set on any of them."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array([flag], np.uint8))))


def _broadcast(array: np.ndarray) -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)
