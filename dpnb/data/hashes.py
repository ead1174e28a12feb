"""Hashes of files, kept between runs; of photographs in several places; read ahead by threads."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dpnb import cache
from dpnb.files import write_atomic

READERS = 8  # threads that read files not hashed before: they wait for the disk most of the time
SMALL = 2**20  # bytes of a file that is read as a whole
CHUNK = 32  # files that a thread takes at a time


def hash_files(folders: Iterable[tuple[str, list[str]]]) -> tuple[str, np.ndarray]:
    """Hashes all files of some folders.

    The hash of a file is cached (`dpnb.cache`), for the user alone, by its size, inode and times of change.

    Args:
      folders: path of each folder and the sorted names of its files, in the order of the folders' paths.
    Returns:
      (SHA-256 in hexadecimal over names and contents, bytes [n] of 32: SHA-256 of each file's content).
    """
    digest, hashes = hashlib.sha256(), bytearray()
    with ThreadPoolExecutor(READERS) as pool:
        for folder, names in folders:
            last, contents = os.path.basename(folder), _hash_folder(folder, names, pool)
            lines = (f"{last}/{name} {content}\n" for name, content in zip(names, contents, strict=True))
            digest.update(os.fsencode("".join(lines)))
            hashes += bytes.fromhex("".join(contents))
    return digest.hexdigest(), np.frombuffer(bytes(hashes), "S32")


def _hash_folder(folder: str, names: list[str], pool: ThreadPoolExecutor) -> list[str]:
    """Returns SHA-256 (hex) of the content of each file, from the cache where it is known."""
    place = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:32]
    memory = _memory(f"{place}.json")
    known = _read(memory)
    at = os.open(folder, os.O_RDONLY)  # names below it are found faster than whole paths
    try:
        keys = [_key(name, at) for name in names]
        missing = [row for row, key in enumerate(keys) if key not in known]
        parts = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]

        def read(rows: list[int]) -> dict[str, str]:
            return {keys[row]: _content(os.path.join(folder, names[row])) for row in rows}

        for part in pool.map(read, parts):
            known.update(part)
    finally:
        os.close(at)
    if missing and memory:
        with contextlib.suppress(OSError):  # another process writes the same, or the cache is read-only
            write_atomic(memory, json.dumps(known), mode=0o600)
    return [known[key] for key in keys]


def _key(name: str, at: int) -> str:
    stat = os.stat(name, dir_fd=at)
    return f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _content(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= SMALL:  # in half the time
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory(name: str) -> pathlib.Path | None:
    """Returns a file of the cache, in a folder that nobody but the user may enter: hashes tell names and contents.

    It is None if nothing is to be kept or can be.
    """
    with contextlib.suppress(OSError):
        if cache.active():
            folder = cache.folder() / "hashes"
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            return folder / name
    return None


def _read(memory: pathlib.Path | None) -> dict[str, str]:
    """Returns the hashes in a file of the cache; {} if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(memory.read_text()) if memory else {}
        if isinstance(known, dict) and all(isinstance(x, str) and len(x) == 64 for x in known.values()):
            return known
    return {}


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
