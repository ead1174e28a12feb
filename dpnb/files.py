"""Small files that are written atomically, and the folder of what must not be published."""

import contextlib
import hashlib
import os
import pathlib
import tempfile
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
    partial = path.with_name(
        f".{shortened(path.name)}.{os.getpid()}.partial"
    )  # one for each process that writes
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


LONGEST = 255  # bytes of one name on nearly every file system
OF_A_FOLDER = 143  # bytes that also fit encrypted ones (eCryptfs)


def shortened(name: str) -> str:
    """Returns the name of a folder, cut if it is too long for a file system, with a hash in place of the rest.

    >>> shortened("teach-seed0"), len(shortened("teach-seed0" + "-learning_rate=1.0" * 20))
    ('teach-seed0', 143)
    """
    encoded = os.fsencode(name)
    if len(encoded) <= OF_A_FOLDER:
        return name
    ending = "-" + hashlib.sha256(encoded).hexdigest()[:16]
    return encoded[: OF_A_FOLDER - len(ending)].decode(errors="ignore") + ending


def writable_folder(path: pathlib.Path) -> pathlib.Path:
    """Returns the folder, which is made if missing, after a file was written to it and removed.

    Raises:
      ValueError: a name in the path is too long for a file system.
      OSError: it cannot be made or written, of the kind that the system says.
    """
    for name in path.parts:
        if len(os.fsencode(name)) > LONGEST:
            raise ValueError(
                f"the name of a folder must have at most {LONGEST} bytes, got {len(os.fsencode(name))}: "
                f"{name[:40]} ...; choose a shorter one"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"written")
    except OSError as error:
        raise type(error)(
            f"{path} must be a folder that can be written ({error.strerror}); choose another"
        ) from error
    return path


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


def readable_size(count: int) -> str:
    """Returns a number of bytes in KiB, MiB or GiB.

    >>> readable_size(400), readable_size(3 * 2**20), readable_size(5 * 2**30)
    ('0.4 KiB', '3.0 MiB', '5.0 GiB')
    """
    power = 1 + (count >= 2**20) + (count >= 2**30)
    return f"{count / 2 ** (10 * power):.1f} {'KMG'[power - 1]}iB"
