"""The cache on disk: what is slow to make and can be made again, by everything that it is made from.

An entry is a folder KIND/HASH with `entry.json` (the full key, a value, and hashes of the arrays) and one
.npy file for each array. Every entry is checked by its hashes whenever it is read; one that is damaged, or
whose key is another one, is not there. The cache never raises for want of a disk: without one, everything
is made again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

GIB = 10.0  # the bound, unless DPNB_CACHE_GIB says another
KINDS = (
    "images",
    "features",
    "accounting",
    "hashes",
)  # the last are of `dpnb.data.sources`, in files of its own
ABANDONED = 24 * 3600.0  # seconds after which a partial entry that nobody writes to is removed
_unused = False  # inside `unused`
_warned = False  # one sentence for each process


@dataclasses.dataclass(frozen=True)
class Found:
    """What an entry holds: a value of JSON's kinds, and arrays that are mapped into memory, read-only."""

    value: Any
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry as `dpnb cache` lists it: what it is, bytes, and seconds since it was made and last used."""

    kind: str
    what: str
    path: pathlib.Path
    size: int
    age: float
    idle: float


def folder() -> pathlib.Path:
    """The cache's folder: `$DPNB_CACHE`, else `dpnb` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
      OSError: it would be relative, and move with the working directory, or lie in the folder of a run.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dpnb")
    root = pathlib.Path(os.environ.get("DPNB_CACHE") or root)
    try:
        root = root.expanduser()
    except RuntimeError as error:
        raise OSError(f"no home directory ({error}); set DPNB_CACHE") from None
    if not root.is_absolute():
        raise OSError(f"DPNB_CACHE must be an absolute path, got {root}")
    for above in (root, *root.parents):
        if any((above / name).exists() for name in ("ledger.jsonl", "private/ledger.jsonl", "result.json")):
            raise OSError(f"DPNB_CACHE must not lie in the folder of a run, got {root}")
    return root


def compiled_folder() -> pathlib.Path:
    """The folder of JAX's compiled programs: `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/dpnb`."""
    return pathlib.Path(
        os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path.home() / ".cache" / "dpnb"
    )


def bound() -> int:
    """The largest size of the cache in bytes: `$DPNB_CACHE_GIB` GiB, else `GIB`; 0 means no cache.

    Raises:
      OSError: it is not a number of at least 0.
    """
    text = os.environ.get("DPNB_CACHE_GIB") or str(GIB)
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return int(float(text) * 2**30)
    raise OSError(f"DPNB_CACHE_GIB must be a number of GiB, at least 0, got {text!r}")


def active() -> bool:
    """Whether entries are read and written: the bound is not 0, and we are not inside `unused`.

    Raises:
      OSError: see `bound`.
    """
    return not _unused and bound() > 0


@contextlib.contextmanager
def unused() -> Iterator[None]:
    """Neither reads nor writes the cache inside the block: what must prove something computes it."""
    global _unused
    before, _unused = _unused, True
    try:
        yield
    finally:
        _unused = before


def get(kind: str, key: Mapping[str, Any]) -> Found | None:
    """The entry of that key, checked by its hashes; None if there is none. One that is damaged is removed.

    Args:
      kind: one of `KINDS`.
      key: all that the content is made from, of JSON's kinds.
    """
    with _quietly():
        if not active():
            return None
        place = _place(kind, key)
        try:
            entry = json.loads((place / "entry.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return _remove(place)
        if not isinstance(entry, dict) or entry.pop("checksum", None) != _sha256(entry):
            return _remove(place)
        if _canonical(entry["key"]) != _canonical(key):
            return None
        arrays = {}
        for name, said in entry["arrays"].items():
            try:
                arrays[name] = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError, FileNotFoundError):
                return _remove(place)
            if _hash(arrays[name]) != said:
                return _remove(place)
        with contextlib.suppress(OSError):
            os.utime(place / "entry.json")  # the time of last use
        return Found(entry["value"], arrays)
    return None


def put(
    kind: str,
    key: Mapping[str, Any],
    what: str,
    value: Any = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Keeps a value and arrays under a key, in place of an older entry of it.

    Args:
      kind, key: as in `get`.
      what: what it is, in words, for `dpnb cache`.
      value: of JSON's kinds.
      arrays: by name; they are copied.
    """
    arrays = arrays or {}
    with filling(
        kind, key, what, {n: (a.shape, a.dtype) for n, a in arrays.items()}, value, copy=False
    ) as made:
        for name, array in arrays.items():
            if name in made:
                made[name][...] = array


@contextlib.contextmanager
def filling(
    kind: str,
    key: Mapping[str, Any],
    what: str,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
    value: Any = None,
    *,
    copy: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields arrays of zeros to fill; when the block ends without an error, they are an entry.

    They lie on disk, whose space is taken before the block begins, or in memory if there is no cache or no
    room in it. Of a block that ends in an error nothing is kept. Afterwards the arrays are read-only.

    Args:
      kind, key, what, value: as in `put`.
      shapes: {name: (shape, dtype)}.
      copy: yield arrays in memory if there is no cache, and not nothing.
    """
    partial, arrays = None, None
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
    with _quietly():
        if active():
            if size > bound():
                raise OSError(
                    f"{what} takes {size / 2**30:.2g} GiB, and DPNB_CACHE_GIB is {bound() / 2**30:.3g}"
                )
            partial = _partial(kind, key)
            _make_room(size)
            arrays = {name: _array_file(partial / f"{name}.npy", *of) for name, of in shapes.items()}
    kept = arrays is not None
    if arrays is None:
        arrays = {name: np.zeros(*of) for name, of in shapes.items()} if copy else {}
    try:
        yield arrays
        for array in arrays.values():
            array.flags.writeable = False
        with _quietly():
            if kept and partial is not None:
                entry = {"kind": kind, "key": key, "what": what, "value": value, "made": time.time()}
                entry["arrays"] = {name: _hash(array) for name, array in arrays.items()}
                entry = json.loads(json.dumps(entry))
                _write(partial / "entry.json", json.dumps({**entry, "checksum": _sha256(entry)}).encode())
                _move(partial, _place(kind, key))
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def entries() -> list[Entry]:
    """All entries, the least recently used first.

    Raises:
      OSError: there is no usable folder, see `folder`.
    """
    found, now = [], time.time()
    for kind in KINDS:
        for path in (folder() / kind).glob("[!.]*"):
            entry = path / "entry.json" if path.is_dir() else path
            with contextlib.suppress(OSError):
                used = entry.stat().st_mtime
                what, made = _described(path, used)
                found.append(Entry(kind, what, path, _size(path), now - made, now - used))
    return sorted(found, key=lambda entry: -entry.idle)


def clear(kind: str | None = None) -> int:
    """Removes all entries of a kind, or all; returns the bytes that they took.

    Raises:
      OSError: there is no usable folder, or an entry cannot be removed.
    """
    freed = 0
    for entry in entries():
        if kind in (None, entry.kind):
            shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
            freed += entry.size
    return freed


@functools.cache
def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages; "" for one that is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.cache
def code(*files: str) -> str:
    """SHA-256 (hex) of source files of dpnb (`data/tfds.py`, or `models` for all below it), for keys."""
    digest, package = hashlib.sha256(), pathlib.Path(__file__).parent
    for name in files:
        for path in sorted((package / name).rglob("*.py")) if (package / name).is_dir() else [package / name]:
            digest.update(
                f"{path.relative_to(package)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
            )
    return digest.hexdigest()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Turns an OSError into a warning, the first time."""
    global _warned
    try:
        yield
    except OSError as error:
        if not _warned:
            _warned = True
            warnings.warn(f"nothing is cached: {error}", stacklevel=4)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _sha256(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _hash(array: np.ndarray) -> str:
    """SHA-256 (hex) of dtype, shape and bytes of an array in C order."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    if array.size:
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _place(kind: str, key: Mapping[str, Any]) -> pathlib.Path:
    return folder() / kind / _sha256(key)[:32]


def _partial(kind: str, key: Mapping[str, Any]) -> pathlib.Path:
    """A new folder beside an entry's place, which only this process and this call write to."""
    place = _place(kind, key)
    place.parent.parent.mkdir(parents=True, exist_ok=True)
    place.parent.mkdir(mode=0o700, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    partial.mkdir(mode=0o700)
    return partial


def _write(path: pathlib.Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _array_file(path: pathlib.Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A .npy file of zeros, mapped into memory. Its space is taken: a full disk is met here, not later."""
    _write(path, b"")
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _move(partial: pathlib.Path, place: pathlib.Path) -> None:
    """Puts a finished entry in its place, unless another process was faster in that moment."""
    _remove(place)
    try:
        partial.rename(place)
    except OSError:
        if not place.exists():
            raise


def _remove(place: pathlib.Path) -> None:
    """Takes an entry away at once, and then deletes it."""
    aside = place.with_name(f".{place.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    with contextlib.suppress(FileNotFoundError):
        place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _make_room(size: int) -> None:
    """Removes the least recently used until `size` more bytes fit, and what was left half made."""
    for partial in folder().glob("*/.*.partial"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)
    kept = [entry for entry in entries() if entry.path.is_dir()]
    total = size + sum(entry.size for entry in kept)
    for entry in kept:
        if total <= bound():
            break
        _remove(entry.path)
        total -= entry.size


def _size(path: pathlib.Path) -> int:
    """Bytes on disk, those of small files rounded up as the disk does."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files)


def _described(path: pathlib.Path, used: float) -> tuple[str, float]:
    """(what an entry is, when it was made)."""
    if not path.is_dir():
        return "hashes of the files in a folder of data", used
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads((path / "entry.json").read_bytes())
        return str(entry["what"]), float(entry["made"])
    return "damaged", used
