"""`dpnb doctor`: what is right and what is wrong is seen, nothing makes it crash, and it names nobody."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
import sys

import pytest
from shared_runs import ROOT

from dpnb import cache, cli, folders
from dpnb.commands import doctor
from dpnb.data import DataError, tfds


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, with an empty home in it and no data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "home" / "tfds"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


@pytest.fixture
def one_device(monkeypatch):
    """JAX is not asked, which takes a second."""
    monkeypatch.setattr(doctor, "devices", lambda: [doctor.Line("ok", "JAX", "1 x cpu")])


@pytest.fixture
def versions(monkeypatch):
    """Replaces what is installed by {package: (version, what it needs)}."""

    def replace(packages):
        monkeypatch.setattr(cache, "versions", lambda *names: {n: packages.get(n, ("",))[0] for n in names})
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: packages[name][1])

    return replace


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """Replaces the file of constraints by these lines."""

    def write(*lines):
        (tmp_path / "constraints.txt").write_text("\n".join(lines))
        monkeypatch.setattr(doctor, "constraints", lambda: tmp_path / "constraints.txt")

    return write


def test_this_installation_is_sound(here, capsys):
    """One screen, and nothing is left behind."""
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    text = " ".join(" ".join(lines).split())
    assert lines[-1].startswith("problems: 0, notes: ")
    assert "8 x cpu" in text and f"jax {importlib.metadata.version('jax')}" in text
    assert "can be written and locked" in text and "runs this Python" in text
    assert "not prepared" in text and "run: python -m dpnb.data cifar10" in text
    assert str(here / "home") not in text and "~/tfds" in text
    assert [*here.iterdir()] == [here / "home"]


def test_a_version_that_differs_is_named_with_both(versions, pinned):
    versions({"dpnb": ("0.1", []), "jax": ("0.9", []), "numpy": ("2.1", []), "six": ("1.0", [])})
    pinned("# made by hand", "jax==0.11.2", "numpy==2.1 ; python_full_version >= '3.0'", "pandas==3.0",
           "six==2.0 ; python_full_version < '3.0'")  # fmt: skip
    note, ok = doctor.packages()
    assert (note.level, ok.level) == ("note", "ok")
    assert "jax 0.9 (there 0.11.2)" in note.text
    assert not [name for name in ("numpy", "pandas", "six") if name in note.text]
    assert (
        "jax 0.9, jaxlib missing, flax missing, numpy 2.1; as constraints.txt has it for this Python: 1 packages"
        in ok.text
    )


def test_missing_packages_and_broken_ranges(versions, pinned):
    """Those that dpnb needs and those that they need, with their extras, for this system and this Python."""
    needs = [
        "jax>=0.10,<0.12",
        "optax",
        "flax",
        "etils[epath]",
        "old; python_version < '3'",
        "pytest; extra == 'test'",
    ]
    etils = ["fsspec>=2024; extra == 'epath'", "edc; extra == 'edc'"]
    packages = {"dpnb": ("0.1", needs), "jax": ("0.12.1", ["scipy>=1.13"]), "etils": ("1", etils)}
    packages["flax"] = ("0.12", ["jax>0.9,<0.12"])
    versions(packages | {"scipy": ("1.14", []), "fsspec": ("2023.1", None)})
    pinned("jax==0.12.1")
    problem, _ = doctor.packages()
    said, todo = problem.text.split("; run: python -m pip install ")
    assert problem.level == "problem" and said.count(" is ") == 3
    assert "optax is missing (dpnb needs it)" in said and "fsspec is 2023.1 (etils needs >=2024)" in said
    assert "jax is 0.12.1 (dpnb needs <0.12,>=0.10, flax needs <0.12,>0.9)" in said
    assert set(todo.split()) == {"'optax'", "'fsspec>=2024'", "'jax<0.12,>0.9,>=0.10'"}


def test_without_constraints(here, monkeypatch):
    assert doctor.constraints() == ROOT / "constraints.txt"
    monkeypatch.setattr(folders, "CONSTRAINTS", here / "constraints.txt")
    assert doctor.constraints() is None
    assert [line.level for line in doctor.packages()][-1] == "note"


def test_another_dpnb_than_the_installed_one(here, monkeypatch):
    monkeypatch.setattr(doctor, "__file__", str(here / "elsewhere" / "dpnb" / "commands" / "doctor.py"))
    line, _ = doctor.installation()
    assert line.level == "note" and str(here / "elsewhere") in line.text and "but installed is" in line.text

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert doctor.installation()[0].level == "problem"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('no jaxlib')", "ImportError: no jaxlib"),
        ("def local_devices(): raise RuntimeError('no backend\\nat all')", "RuntimeError: no backend at all"),
        ("import os; os.abort()", "ended with status -6"),
        ("import time; time.sleep(60)", "no answer in 0.5 s"),
    ],
)
def test_a_broken_jax_is_one_line(here, monkeypatch, source, said):
    (here / "jax.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(here))
    monkeypatch.setattr(doctor, "PATIENCE", 0.5 if "sleep" in source else 60)
    (line,) = doctor.devices()
    assert line.level == "problem" and said in " ".join(line.text.split())


def test_the_memory_of_devices(here, monkeypatch):
    fake = """
class Device:
    platform, device_kind = "gpu", "Fast 9"
    def __init__(self, used): self.used = used
    def memory_stats(self): return {"bytes_limit": 8 * 2**30, "bytes_in_use": self.used * 2**30}
def local_devices(): return [Device(3), Device(1)]
"""
    (here / "jax.py").write_text(fake)
    monkeypatch.setenv("PYTHONPATH", str(here))
    assert doctor.devices() == [("ok", "JAX", "2 x gpu Fast 9, 5.0 GiB free for arrays")]


def test_a_gpu_that_jax_does_not_use(here, monkeypatch):
    monkeypatch.setattr(doctor, "NVIDIA", str(here))
    (line,) = doctor.devices()
    assert line.level == "note" and "there is an NVIDIA driver; JAX_PLATFORMS is cpu" in line.text
    monkeypatch.delenv("JAX_PLATFORMS")
    (line,) = doctor.devices()
    assert line.level == "note" and "install jax[cuda12] or jax[cuda13]" in line.text


def test_a_folder_that_cannot_be_written(here, capsys, one_device):
    (here / "file").touch()
    assert cli.main(["doctor", "--out", "file/runs"]) == 1
    out = capsys.readouterr().out
    assert "problem runs" in out and "Not a directory" in out and "problems: 1," in out


def test_a_folder_that_cannot_be_locked(here, monkeypatch):
    assert doctor.runs(here / "a" / "b")[0].level == "ok"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    (line,) = doctor.runs(here)
    assert line.level == "problem" and "a lock keeps nobody out" in line.text

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (line,) = doctor.runs(here)
    assert line.level == "problem" and "cannot be locked ([Errno 95] Operation not supported)" in line.text
    assert [*here.rglob("*")] == [here / "home"]


@pytest.mark.parametrize("error", [ZeroDivisionError("of what\nand why"), SystemExit(3)])
def test_a_check_that_fails_is_one_line_and_the_others_go_on(here, capsys, monkeypatch, one_device, error):
    def fails():
        raise error

    monkeypatch.setattr(doctor, "caches", fails)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("problem ")]
    assert " ".join(line.split()) == f"problem caches {type(error).__name__}: {' '.join(str(error).split())}"
    assert "cifar10" in out and "problems: 1," in out


def test_cifar10(here, monkeypatch):
    """Prepared is well, absent is a note, damaged is a problem."""
    builder = type("Builder", (), {"data_path": here / "data" / "cifar10" / "3.0.2"})
    monkeypatch.setattr(tfds, "prepared", lambda name, data_dir: builder)
    assert doctor.data(str(here / "data"))[1] == ("ok", "cifar10", f"prepared in {builder.data_path}")

    def fails(name, data_dir):
        raise DataError("no")

    monkeypatch.setattr(tfds, "prepared", fails)
    assert doctor.data(str(here / "data"))[1] == ("note", "cifar10", "no")
    builder.data_path.mkdir(parents=True)
    (builder.data_path / "a.array_record").write_bytes(bytes(2048))
    line, cifar10 = doctor.data(str(here / "data"))
    assert cifar10 == ("problem", "cifar10", "no") and "holds 2.0 KiB" in line.text


def test_the_caches(here, disk_cache, monkeypatch):
    cache.put("accounting", {"n": 2}, "sigma of 150 steps", 0.5)
    compiled = here / "compiled"
    compiled.mkdir()
    (compiled / "jit_f-cache").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    first, second = doctor.caches()
    assert f"{disk_cache} holds" in first.text and "of 1.0 GiB" in first.text
    assert f"{compiled} holds 3.0 MiB" in second.text
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert [line.level for line in doctor.caches()] == ["note", "note"]


@pytest.mark.parametrize("command", ["python", sys.executable, "/usr/bin/nothing/python3"])
def test_the_kernel_must_be_this_python(here, monkeypatch, command):
    """A kernel of the user's that comes before the environment's own, and names a Python."""
    kernels = here / "share" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    spec = {"argv": [command, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "P"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(here / "share"))
    (line,) = doctor.kernel()
    assert str(kernels) in line.text
    assert line.level == ("problem" if "nothing" in command else "ok")
    assert ("ipykernel install --sys-prefix" in line.text) == ("nothing" in command)


def test_the_limits_of_a_container(here, monkeypatch):
    files = {"cpu.max": "50000 100000", "memory.max": str(3 * 2**30), "memory.current": str(2**31 + 2**29)}
    files["memory.stat"] = f"anon 1\ninactive_file {2**28}\nactive_file 1"
    for name, text in files.items():
        (here / name).write_text(text)
    monkeypatch.setattr(doctor, "CGROUPS", here)
    (line,) = doctor.machine()
    assert line.level == "note" and "0.5 of" in line.text and "768.0 MiB of memory free" in line.text
    (here / "memory.max").write_text("max")
    (here / "cpu.max").write_text("max 100000")
    assert "0.5 of" not in doctor.machine()[0].text and "768" not in doctor.machine()[0].text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("in /home/ada/runs, of /home/ada.", "in ~/runs, of ~."),
        ("/home/adam and /mnt/home/ada-b", "/home/adam and /mnt/home/ada-b"),
        ("a\nb", "a b"),
    ],
)
def test_the_home_is_abbreviated(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/ada")
    assert doctor._shown(doctor.Line("ok", "x", text)) == f"ok      x         {shown}"


def test_a_long_line_is_wrapped_and_cut():
    lines = doctor._shown(doctor.Line("problem", "x", "a-word " * 1000)).splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= doctor.WIDTH and lines[-1].endswith("...")


def test_little_space_is_a_note(here, monkeypatch):
    usage = type("Usage", (), {"free": 5 * 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (line,) = doctor.runs(pathlib.Path(here))
    assert line.level == "note" and "5.0 MiB free on its disk; make room there" in line.text
