"""Small files that are written atomically, and the folder of what must not be published."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


def write_atomic(path: pathlib.Path, content: str | bytes, mode: int = 0o666) -> None:
    """Writes a file atomically: a crash or power cut leaves the old content or the new one, never a part.

    Args:
      path: the file; its directory exists.
      content: text (written as UTF-8), or bytes.
      mode: permissions of the file from its creation on (less the umask).
    """
    with atomic_file(path, mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Opens a binary file beside `path`, which takes its place when the block ends, synced to disk.

    After an error `path` is unchanged and the partial file is removed; if the process dies, the partial file
    may be left beside it.

    Args:
      path, mode: as in `write_atomic`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # one for each process that writes
    partial.unlink(missing_ok=True)
    partial.touch(mode=mode)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Syncs the names in a folder to disk, so that they survive a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def private_folder(directory: str | pathlib.Path, secret: bool) -> pathlib.Path:
    """Returns the folder for what must not be published of a run: seed, checkpoints, ledger, curve.

    Args:
      directory: of the run.
      secret: whether the run's seed is secret; then it is `directory/private`, mode 0700, made if missing.
        Otherwise the data are public, nothing is kept apart, and it is `directory` itself.
    Raises:
      ValueError: the directory holds a run of the other kind.
    """
    folder = pathlib.Path(directory)
    other = folder / "ledger.jsonl" if secret else folder / "private" / "ledger.jsonl"
    if other.exists():
        raise ValueError(
            f"{folder} must hold one run, but holds another one, with a {'published' if secret else 'secret'} seed or "
            "of an earlier version; choose another directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if secret:
        folder = folder / "private"
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    return folder
