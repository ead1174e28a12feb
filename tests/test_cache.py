"""dpnb.cache: an entry is what was put there, or not there, whatever happens to disk and processes."""

import json
import os
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from dpnb import cache

KEY = {"of": "these", "version": [1, 2.5, None]}
ROWS = np.arange(3000, dtype=np.float32).reshape(100, 30)


def put(key=KEY, kind="features", rows=ROWS, value=None):
    cache.put(kind, key, "rows", value, {"rows": rows})


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_entry_is_what_was_put_there(disk_cache):
    assert cache.get("features", KEY) is None
    put(value={"sigma": 0.1 + 0.2})
    found = cache.get("features", KEY)
    assert found.value == {"sigma": 0.1 + 0.2}
    assert isinstance(found.arrays["rows"], np.memmap) and not found.arrays["rows"].flags.writeable
    np.testing.assert_array_equal(found.arrays["rows"], ROWS)
    assert cache.get("features", {**KEY, "version": [1, 2.5, 0]}) is None
    assert cache.get("images", KEY) is None
    put(rows=-ROWS)  # in place of the older one
    np.testing.assert_array_equal(cache.get("features", KEY).arrays["rows"], -ROWS)
    np.testing.assert_array_equal(found.arrays["rows"], ROWS)  # whoever reads it still does


def test_nobody_else_may_read_it(disk_cache):
    put()
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(disk_cache)} == {0o600}
    folders = [path for path in disk_cache.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


@pytest.mark.parametrize("name", ["entry.json", "rows.npy"])
def test_one_changed_bit_anywhere_is_noticed(disk_cache, name):
    """Every byte of the small file, and some of the large one, its header included."""
    put(value=1.0)
    (path,) = disk_cache.rglob(name)
    whole = path.read_bytes()
    for at in range(0, len(whole), 1 if name == "entry.json" else 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = cache.get("features", KEY)
        if found:  # a bit that says nothing, such as the padding of a header
            assert found.value == 1.0
            np.testing.assert_array_equal(found.arrays["rows"], ROWS)
        else:
            put(value=1.0)
    path.write_bytes(whole[: len(whole) // 2])
    assert cache.get("features", KEY) is None
    assert not files(disk_cache)  # it is gone, and will be made again


@pytest.mark.parametrize("name", ["entry.json", "rows.npy"])
def test_a_lost_file_is_an_entry_that_is_not_there(disk_cache, name):
    put()
    (path,) = disk_cache.rglob(name)
    path.unlink()
    assert cache.get("features", KEY) is None


def test_an_edited_entry_is_not_believed(disk_cache):
    put(value={"sigma": 2.0}, kind="accounting")
    (path,) = disk_cache.rglob("entry.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "value": {"sigma": 0.2}}))
    assert cache.get("accounting", KEY) is None


def test_an_entry_under_the_name_of_another_is_not_served(disk_cache):
    put()
    (mine,) = (disk_cache / "features").iterdir()
    put({"other": 1}, rows=-ROWS)
    (other,) = set((disk_cache / "features").iterdir()) - {mine}
    (mine / "entry.json").unlink()
    (mine / "rows.npy").unlink()
    for path in other.iterdir():
        path.rename(mine / path.name)
    assert cache.get("features", KEY) is None


def test_what_ends_in_an_error_is_not_kept(disk_cache):
    shapes = {"rows": (ROWS.shape, ROWS.dtype)}
    with pytest.raises(KeyboardInterrupt), cache.filling("features", KEY, "rows", shapes) as made:
        made["rows"][:50] = 1
        raise KeyboardInterrupt
    assert cache.get("features", KEY) is None and not files(disk_cache)


def test_what_is_filled_stays_readable(disk_cache):
    with cache.filling("features", KEY, "rows", {"rows": (ROWS.shape, ROWS.dtype)}) as made:
        assert isinstance(made["rows"], np.memmap)
        assert cache.get("features", KEY) is None  # not yet
        made["rows"][:] = ROWS
    np.testing.assert_array_equal(made["rows"], ROWS)
    assert not made["rows"].flags.writeable
    np.testing.assert_array_equal(cache.get("features", KEY).arrays["rows"], ROWS)


def test_the_least_recently_used_go_first(disk_cache, monkeypatch):
    monkeypatch.setenv(
        "DPNB_CACHE_GIB", str(3.5 * 16384 / 2**30)
    )  # three of 12,000 bytes and their entry.json
    for n in range(3):
        put({"n": n})
        (at,) = [e.path for e in cache.entries() if e.idle < 1000]
        os.utime(at / "entry.json", (0, time.time() - 5000 + n))
    assert len(cache.entries()) == 3
    assert cache.get("features", {"n": 0})  # used now
    put({"n": 3})
    assert [bool(cache.get("features", {"n": n})) for n in range(4)] == [True, False, True, True]
    put({"large": 1}, rows=np.zeros(3 * 4096, np.float32))  # takes the place of all
    assert len(cache.entries()) == 1


def test_what_is_larger_than_the_bound_stays_in_memory(disk_cache, monkeypatch):
    put({"small": 1}, rows=ROWS[:3])
    monkeypatch.setenv("DPNB_CACHE_GIB", "0.00001")
    with (
        pytest.warns(
            UserWarning, match="nothing is cached: rows takes 1.1e-05 GiB, and DPNB_CACHE_GIB is 1e-05"
        ),
        cache.filling("features", KEY, "rows", {"rows": (ROWS.shape, ROWS.dtype)}) as made,
    ):
        made["rows"][:] = ROWS
    np.testing.assert_array_equal(made["rows"], ROWS)
    assert len(cache.entries()) == 1  # and drives nothing out


def test_a_partial_entry_that_nobody_writes_to_is_removed(disk_cache):
    old, new = (disk_cache / "features" / f".{name}.1.2.partial" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "rows.npy").write_bytes(b"half")
    for path in (old / "rows.npy", old):
        os.utime(path, (0, time.time() - 2 * cache.ABANDONED))
    put()
    assert new.exists() and not old.exists()
    assert [entry.what for entry in cache.entries()] == ["rows"]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"DPNB_CACHE": "/dev/null/cache"}, "Not a directory"),
        ({"DPNB_CACHE": "/proc/cache"}, "/proc/cache"),
        ({"DPNB_CACHE": "relative"}, "absolute path, got relative"),
        ({"DPNB_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/proc/nobody"}, "/proc/nobody"),
        ({"DPNB_CACHE_GIB": "much"}, "DPNB_CACHE_GIB must be a number of GiB, at least 0, got 'much'"),
        ({"DPNB_CACHE_GIB": "-1"}, "at least 0"),
        ({"DPNB_CACHE_GIB": "nan"}, "at least 0"),
    ],
)
def test_without_a_cache_one_sentence_is_said_and_all_goes_on(disk_cache, monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning) as said:
        for n in range(3):
            put({"n": n})
            assert cache.get("features", {"n": n}) is None
            with cache.filling("features", {"n": n}, "rows", {"rows": (ROWS.shape, ROWS.dtype)}) as made:
                made["rows"][:] = ROWS
            np.testing.assert_array_equal(made["rows"], ROWS)
    assert len(said) == 1 and says in str(said[0].message)


def test_a_full_disk_is_met_before_the_work(disk_cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = pytest.warns(UserWarning, match="nothing is cached: .*No space left")
    with said, cache.filling("features", KEY, "rows", {"rows": (ROWS.shape, ROWS.dtype)}) as made:
        assert not isinstance(made["rows"], np.memmap)
    assert cache.get("features", KEY) is None and not files(disk_cache)


@pytest.mark.parametrize("mark", ["ledger.jsonl", "private/ledger.jsonl", "result.json"])
def test_it_never_lies_in_the_folder_of_a_run(tmp_path, monkeypatch, disk_cache, mark):
    (tmp_path / "run" / mark).parent.mkdir(parents=True)
    (tmp_path / "run" / mark).touch()
    monkeypatch.setenv("DPNB_CACHE", str(tmp_path / "run" / "below" / "cache"))
    with pytest.warns(UserWarning, match="must not lie in the folder of a run"):
        put()
    assert [path.name for path in files(tmp_path / "run")] == [mark.split("/")[-1]]


def test_zero_means_none_and_says_nothing(disk_cache, monkeypatch):
    put()
    monkeypatch.setenv("DPNB_CACHE_GIB", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put({"n": 1})
        assert cache.get("features", KEY) is None and len(cache.entries()) == 1


def test_inside_unused_it_is_neither_read_nor_written(disk_cache):
    put()
    with cache.unused():
        assert cache.get("features", KEY) is None
        put({"n": 1})
    assert cache.get("features", KEY) and cache.get("features", {"n": 1}) is None


def test_entries_and_clear(disk_cache):
    put()
    put(kind="images")
    hashes = disk_cache / "hashes" / "0.json"  # as `dpnb.data.sources` keeps them
    hashes.parent.mkdir()
    hashes.write_text("{}")
    (disk_cache / "jit_program-cache").touch()  # what else is kept there is no entry
    (disk_cache / "weights").mkdir()
    assert sorted(e.kind for e in cache.entries()) == ["features", "hashes", "images"]
    assert all(12_000 < e.size < 30_000 and 0 <= e.age < 100 for e in cache.entries() if e.kind != "hashes")
    assert cache.clear("images") > 12_000
    assert sorted(e.kind for e in cache.entries()) == ["features", "hashes"]
    cache.clear()
    assert not cache.entries()
    assert sorted(path.name for path in disk_cache.iterdir() if path.name not in cache.KINDS) == [
        "jit_program-cache",
        "weights",
    ]


def test_several_processes_fill_it_at_once(disk_cache):
    """Four processes put and get the same entries; none ever sees another content than its own would be."""
    code = """if True:
        import numpy as np
        from dpnb import cache
        for n in range(40):
            key, rows = {"n": n % 4}, np.full(5000, n % 4, np.int32)
            found = cache.get("features", key)
            assert found is None or (found.value == n % 4 and (found.arrays["rows"] == rows).all())
            cache.put("features", key, "rows", n % 4, {"rows": rows})
        """
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert all(cache.get("features", {"n": n}).value == n for n in range(4))
    assert not [*disk_cache.rglob("*.partial")]


def test_keys_follow_code_and_versions(tmp_path, monkeypatch):
    assert cache.versions("numpy", "no-such-package") == {"numpy": np.__version__, "no-such-package": ""}
    package = tmp_path / "dpnb"
    (package / "models").mkdir(parents=True)
    for name in ("files.py", "models/a.py"):
        (package / name).write_text("1")
    monkeypatch.setattr(cache, "__file__", str(package / "cache.py"))
    before = cache.code.__wrapped__("files.py", "models")
    assert cache.code.__wrapped__("files.py", "models") == before
    (package / "models" / "a.py").write_text("2")
    assert cache.code.__wrapped__("files.py", "models") != before
