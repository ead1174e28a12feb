"""Hashes of files, kept between runs; of photographs in several places; read ahead by threads."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dpnb.files import write_atomic

HASHES = "dpnb/hashes"  # below the user's cache directory: hashes of files, by size and time of change
READERS = 16  # threads that read files not hashed before: they wait for the disk most of the time
CHUNK = 32  # files that a thread takes at a time


def hash_files(folders: Iterable[tuple[str, list[str]]]) -> tuple[str, np.ndarray]:
    """Hashes all files of some folders.

    The hash of a file is cached in the user's cache directory, for the user alone, by its size, inode and
    times of change.

    Args:
      folders: path of each folder and the sorted names of its files, in the order of the folders' paths.
    Returns:
      (SHA-256 in hexadecimal over names and contents, bytes [n] of 32: SHA-256 of each file's content).
    """
    digest, hashes = hashlib.sha256(), bytearray()
    with ThreadPoolExecutor(READERS) as pool:
        for folder, names in folders:
            last = os.path.basename(folder)
            for name, content in zip(names, _hash_folder(folder, names, pool), strict=True):
                digest.update(os.fsencode(f"{last}/{name} {content}\n"))
                hashes += bytes.fromhex(content)
    return digest.hexdigest(), np.frombuffer(bytes(hashes), "S32")


def _hash_folder(folder: str, names: list[str], pool: ThreadPoolExecutor) -> list[str]:
    """Returns SHA-256 (hex) of the content of each file, from the cache where it is known."""
    place = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:32]
    memory = _cache_folder() / f"{place}.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    at = os.open(folder, os.O_RDONLY)  # names below it are found faster than whole paths
    try:
        keys = [_key(name, at) for name in names]
        missing = [row for row, key in enumerate(keys) if key not in known]
        parts = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]

        def read(rows: list[int]) -> dict[str, str]:
            return {keys[row]: _content(names[row], at) for row in rows}

        for part in pool.map(read, parts):
            known.update(part)
    finally:
        os.close(at)
    if missing:
        with contextlib.suppress(OSError):  # another process writes the same, or the cache is read-only
            write_atomic(memory, json.dumps(known), mode=0o600)
    return [known[key] for key in keys]


def _key(name: str, at: int) -> str:
    stat = os.stat(name, dir_fd=at)
    return f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _content(name: str, at: int) -> str:
    with open(name, "rb", opener=lambda path, flags: os.open(path, flags, dir_fd=at)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_folder() -> pathlib.Path:
    """Returns the folder of the hashes, which nobody but the user may enter: they tell names and contents."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), HASHES).expanduser()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    return folder


def copies(hashes: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Counts photographs that are copies of others, to the byte.

    Args:
      hashes: bytes [n], of each photograph; labels: int32 [n].
    Returns:
      (how many would have to go so that all differ, how many of them have another label than their like).
    """
    order = np.lexsort((labels, hashes))
    same = hashes[order][1:] == hashes[order][:-1]
    return int(same.sum()), int((same & (np.diff(labels[order]) != 0)).sum())
