"""Decisions of several processes: process 0 decides and broadcasts to all, and what one refuses all do."""

import contextlib
import hashlib
import json
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpnb.files import write_atomic

PATIENCE = 10.0  # seconds in which a network disk shows a new file


class AnotherProcessFailed(RuntimeError):
    """Another process failed, and says why; this one raises it to stop, too."""


class FirstProcessFailed(AnotherProcessFailed):
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
        raise _agreed(error)
    if "error" in answer:
        raise _agreed(FirstProcessFailed(f"the first process failed: {answer['error']}"))
    return answer["value"]


def _agreed(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same place, each its own."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def have_come_apart(error: Exception) -> bool:
    """Returns whether other processes may be elsewhere after this error, so that none can go on without them."""
    return jax.process_count() > 1 and not getattr(error, "agreed", False)


def any_process(flag: bool) -> bool:
    """Returns, on every process, whether the flag is set on any of them."""
    return bool(processes_where(flag))


def processes_where(flag: bool) -> list[int]:
    """Returns, on every process, the numbers of those on which the flag is set; also a barrier."""
    if jax.process_count() == 1:
        return [0] if flag else []
    from jax.experimental import multihost_utils

    return np.flatnonzero(multihost_utils.process_allgather(np.array([flag], np.uint8))).tolist()


def call_on_all(call: Callable[[], Any]) -> Any:
    """Calls `call`, in which processes do not wait for one another, on every process, and returns each one's result.

    Raises:
      AnotherProcessFailed: where it went well, if it failed elsewhere; there, the error itself is raised.
    """
    value, error = None, None
    try:
        value = call()
    except Exception as raised:
        error = raised
    failed = processes_where(error is not None)
    if failed and error is None:
        error = AnotherProcessFailed(f"process {', '.join(map(str, failed))} failed, and says why")
    if error is not None:
        raise _agreed(error)
    return value


def check_same(what: str, value: str, remedy: str) -> None:
    """Checks that every process has the same text.

    Args:
      what: what it is, for the error: "all processes must have the same WHAT".
      value: the text on this process.
      remedy: the end of the error.
    Raises:
      ValueError: some differ from the first; raised on all of them.
    """
    known = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big")
    if other := processes_where(broadcast_from_process_0(known) != known):
        which = ", ".join(map(str, other))
        raise _agreed(
            ValueError(
                f"all processes must have the same {what}, but that of process {which} differs; {remedy}"
            )
        )


def check_shared(folder: pathlib.Path) -> None:
    """Checks that every process sees what process 0 writes to a folder, which exists there.

    Raises:
      ValueError: some do not; raised on all of them.
      OSError: process 0 cannot write to it; the others raise FirstProcessFailed.
    """
    if jax.process_count() == 1:
        return
    file = folder / f".seen-by-all-{broadcast_from_process_0(secrets.randbits(63)):x}"
    call_on_process_0(lambda: write_atomic(file, ""))
    late = time.monotonic() + PATIENCE
    while not (seen := file.exists()) and time.monotonic() < late:
        time.sleep(0.2)
    blind = processes_where(not seen)
    with contextlib.suppress(OSError):
        if jax.process_index() == 0:
            file.unlink()
    if blind:
        first = call_on_process_0(lambda: str(folder.absolute()))
        raise _agreed(
            ValueError(
                f"all processes must see one folder, but what the first wrote to {first} was not seen by process "
                f"{', '.join(map(str, blind))}; choose one on a disk that all hosts share (--out)"
            )
        )


def _broadcast(array: np.ndarray) -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)
