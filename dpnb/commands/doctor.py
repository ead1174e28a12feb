"""`dpnb doctor`: one screen about an installation and its machine, for reports of bugs.

A check is a function that returns lines. If it raises, that is a line too, and the others are still made.
"""

import functools
import importlib.metadata
import itertools
import json
import operator
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import urllib.parse
import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple

from dpnb import cache, folders
from dpnb.files import readable_size

ALWAYS = ("jax", "jaxlib", "flax", "numpy")  # their versions are named, whatever they are
LITTLE = 2**30  # bytes of memory or disk that are worth a note
WIDTH, LONGEST = 100, 800  # of a printed line, and of what one check says
# In a process of its own, which may hang or die; its last line says all.
PROBE = r"""
import json
try:
    import jax
    found = [[d.platform, d.device_kind, d.memory_stats() or {}] for d in jax.local_devices()]
except BaseException as error:
    found = f"{type(error).__name__}: {error}"
print("\n" + json.dumps(found))
"""
PATIENCE = 60.0  # seconds for it
NVIDIA = "/proc/driver/nvidia/version"  # is there if the driver is
CGROUPS = pathlib.Path("/sys/fs/cgroup")
MEMORY = ("memory.max", "memory.current", "memory.stat")


class Line(NamedTuple):
    """What a check found: how bad it is, of what it speaks, and one sentence, with what to do if it is bad."""

    level: Literal["ok", "note", "problem"]
    about: str
    text: str


def report(out: str | pathlib.Path, data_dir: str | None = None) -> int:
    """Prints the lines of all checks; returns 1 if one of them is a problem, else 0.

    Args:
      out: the folder of runs that is tried.
      data_dir: TFDS directory; None for TFDS's default.
    """
    checks = {
        "dpnb": installation, "packages": packages, "JAX": devices, "kernel": kernel, "machine": machine,
        "runs": functools.partial(runs, pathlib.Path(out).absolute()), "caches": caches,
        "data": functools.partial(data, data_dir),
    }  # fmt: skip
    levels = []
    for about, check in checks.items():
        try:
            found = check()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a broken package raises
            found = [Line("problem", about, f"{type(error).__name__}: {error}")]
        for line in found:
            print(_shown(line), flush=True)
            levels.append(line.level)
    print(f"problems: {levels.count('problem')}, notes: {levels.count('note')}")
    return 1 if "problem" in levels else 0


def _shown(line: Line) -> str:
    """A line as it is printed: wrapped, not endless, and with ~ for the user's home."""
    text = " ".join(line.text.split())
    for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"/"}:
        text = re.sub(rf"(?<!\w){re.escape(home)}(?![\w-])", "~", text)
    text = f"{line.level:8}{line.about:10}{text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}"
    return textwrap.fill(
        text, WIDTH, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False
    )


def constraints() -> pathlib.Path | None:
    """Returns the file of the versions that dpnb was tested with: a checkout's, or a wheel's own; None if there is none."""
    return folders.CONSTRAINTS if folders.CONSTRAINTS.is_file() else None


def installation() -> list[Line]:
    """Version, place and revision of dpnb, and the Python that runs it."""
    from dpnb.results import provenance

    root = pathlib.Path(__file__).resolve().parents[2]
    checkout = (root / "pyproject.toml").is_file()
    where = (
        f"checkout {root}, revision {provenance.git_revision() or 'unknown'}" if checkout else f"in {root}"
    )
    python = Line("ok", "Python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}")
    try:
        found = importlib.metadata.distribution("dpnb")
    except importlib.metadata.PackageNotFoundError:
        return [Line("problem", "dpnb", f"{where}, not installed; run: python -m pip install -e ."), python]
    said = json.loads(found.read_text("direct_url.json") or "{}")
    source = pathlib.Path(str(found.locate_file("")))
    if said.get("dir_info", {}).get("editable"):
        source = pathlib.Path(urllib.parse.unquote(urllib.parse.urlsplit(said["url"]).path))
    if source.resolve() == root:
        return [Line("ok", "dpnb", f"{found.version}, {where}"), python]
    todo = "unset PYTHONPATH, or install this one"
    return [Line("note", "dpnb", f"{where}, but installed is {found.version} of {source}; {todo}"), python]


def packages() -> list[Line]:
    """Packages that are missing or out of range, and those that are not as the constraints have them."""
    lines, wrong = [], {}
    for name, askers in _needed().items():
        version = cache.versions(name)[name]
        unmet = {a: r for a, r in askers.items() if not version or not r.contains(version, prereleases=True)}
        if unmet:
            said = ", ".join(f"{asker} needs {range_ or 'it'}" for asker, range_ in unmet.items())
            range_ = functools.reduce(operator.and_, askers.values())
            wrong[f"{name} is {version or 'missing'} ({said})"] = f"'{name}{range_}'"
    if wrong:
        todo = f"run: python -m pip install {' '.join(wrong.values())}"
        lines.append(Line("problem", "packages", f"{', '.join(wrong)}; {todo}"))
    said = ", ".join(f"{name} {version or 'missing'}" for name, version in cache.versions(*ALWAYS).items())
    if (file := constraints()) is None:
        return [*lines, Line("note", "packages", f"{said}; there is no constraints.txt to compare with")]
    pinned = _pinned(file)
    installed = {name: cache.versions(name)[name] for name in pinned if cache.versions(name)[name]}
    differ = [f"{n} {v} (there {pinned[n]})" for n, v in installed.items() if v != pinned[n]]
    if differ:
        todo = "if a run fails, try it with those"
        lines.append(Line("note", "packages", f"not as constraints.txt has it: {', '.join(differ)}; {todo}"))
    count = f"as constraints.txt has it for this Python: {len(installed) - len(differ)} packages"
    return [*lines, Line("ok", "packages", f"{said}; {count}")]


def _needed() -> dict[str, dict]:
    """{package: {who needs it: in which range}}, of dpnb and of what it needs in turn, dpnb's extras not counted."""
    from packaging import requirements, utils

    found, todo, seen = {}, [("dpnb", "")], set()
    while todo:
        asker, extra = todo.pop()
        if (asker, extra) in seen or not cache.versions(asker)[asker]:
            continue
        seen.add((asker, extra))
        for asked in map(requirements.Requirement, importlib.metadata.requires(asker) or ()):
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                name = utils.canonicalize_name(asked.name)
                found.setdefault(name, {})[asker] = asked.specifier
                todo += [(name, extra) for extra in ("", *asked.extras)]
    return found


def _pinned(file: pathlib.Path) -> dict[str, str]:
    """{package: version} of a file of lines NAME==VERSION, of those lines that are for this Python."""
    from packaging import requirements, utils

    texts = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    asked = [requirements.Requirement(text) for text in texts if text]
    mine = [r for r in asked if r.marker is None or r.marker.evaluate()]
    return {utils.canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in mine}


def devices() -> list[Line]:
    """The devices that JAX finds, and whether it passes over a GPU."""
    command = [sys.executable, "-P", "-c", PROBE]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # leaves a GPU to those who use it
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return [Line("problem", "JAX", f"no answer in {PATIENCE:g} s; end what else uses the device")]
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        return [Line("problem", "JAX", f"ended with status {done.returncode}: {said}; install jax again")]
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, str):
        return [Line("problem", "JAX", f"{found}; install jax and jaxlib again")]
    texts = []
    for kind, several in itertools.groupby(sorted(found, key=lambda d: d[:2]), key=lambda d: d[:2]):
        memory = [stats for *_, stats in several]
        free = [m["bytes_limit"] - m.get("bytes_in_use", 0) for m in memory if "bytes_limit" in m]
        room = f", {readable_size(min(free))} free for arrays" if free else ""
        texts.append(f"{len(memory)} x {' '.join(dict.fromkeys(kind))}{room}")
    text = "; ".join(texts)
    if {d[0] for d in found} == {"cpu"} and os.path.exists(NVIDIA):
        asked = os.environ.get("JAX_PLATFORMS")
        todo = f"JAX_PLATFORMS is {asked}" if asked else "install jax[cuda12] or jax[cuda13], by the driver"
        return [Line("note", "JAX", f"{text}, but there is an NVIDIA driver; {todo}")]
    return [Line("ok", "JAX", text)]


def kernel() -> list[Line]:
    """Whether the kernel in which `dpnb run` executes notebooks is this Python."""
    from jupyter_client import kernelspec, manager

    todo = "run: python -m ipykernel install --sys-prefix, and set JUPYTER_PREFER_ENV_PATH=1"
    try:
        spec = kernelspec.KernelSpecManager().get_kernel_spec("python3")
    except kernelspec.NoSuchKernel:
        return [Line("problem", "kernel", f"there is no kernel python3; {todo}")]
    command = manager.KernelManager(kernel_name="python3").format_kernel_cmd()[0]
    runs, mine = shutil.which(command) or command, sys.executable
    # Not where the links lead to, which is one Python for many environments.
    same = os.path.realpath(os.path.dirname(runs)) == os.path.realpath(os.path.dirname(mine))
    if same and os.path.realpath(runs) == os.path.realpath(mine):
        return [Line("ok", "kernel", f"python3 of {spec.resource_dir} runs this Python")]
    text = f"python3 of {spec.resource_dir} must run {mine}, but runs {runs}"
    return [Line("problem", "kernel", f"{text}; {todo}")]


def machine() -> list[Line]:
    """The cores and the memory that are left to this process, by the system and by its control groups."""
    from dpnb.data import prefetch

    cores, memory = float(prefetch.cores()), []
    if (meminfo := pathlib.Path("/proc/meminfo")).is_file():
        memory = [int(n) * 1024 for n in re.findall(r"^MemAvailable: +(\d+)", meminfo.read_text(), re.M)]
    for group in _groups():
        said = {f: (group / f).read_text().split() for f in ("cpu.max", *MEMORY) if (group / f).is_file()}
        if said.get("cpu.max", ["max"])[0] != "max":
            cores = min(cores, int(said["cpu.max"][0]) / int(said["cpu.max"][1]))
        if said.get("memory.max", ["max"]) != ["max"]:
            used = int(said["memory.current"][0])
            cached = int(said["memory.stat"][said["memory.stat"].index("inactive_file") + 1])
            memory.append(max(0, int(said["memory.max"][0]) - used + cached))
    free = readable_size(min(memory)) if memory else "an unknown amount"
    text = f"{cores:g} of {os.cpu_count()} cores, {free} of memory free"
    if min(memory, default=LITTLE) < LITTLE:
        return [Line("note", "machine", f"{text}; end other programs, or raise the container's limit")]
    return [Line("ok", "machine", text)]


def _groups() -> list[pathlib.Path]:
    """The control groups (version 2) of this process, from its own upwards; the uppermost is a container's own."""
    own = CGROUPS
    if (file := pathlib.Path("/proc/self/cgroup")).is_file():
        own = CGROUPS / "".join(re.findall(r"^0::/(.*)$", file.read_text(), re.M))
    return [group for group in (own, *own.parents) if group.is_relative_to(CGROUPS)]


def runs(out: pathlib.Path) -> list[Line]:
    """Whether a ledger can be written and locked where runs go. What is tried there is removed again."""
    from dpnb.privacy import Ledger, LedgerLocked, PrivacyBudget

    todo = "choose another folder, with --out"
    try:
        with tempfile.TemporaryDirectory(dir=_nearest(out), prefix=".dpnb-doctor-") as folder:
            path, budget = pathlib.Path(folder, "ledger.jsonl"), PrivacyBudget(1.0, 1e-5)
            with warnings.catch_warnings(action="error", category=UserWarning), Ledger(path, budget):
                try:
                    Ledger(path, budget).close()
                    return [Line("problem", "runs", f"in {out} a lock keeps nobody out; {todo}")]
                except LedgerLocked:
                    return [_on_disk("runs", out, "can be written and locked")]
    except UserWarning as warning:
        return [Line("problem", "runs", f"{out} cannot be locked ({warning.__context__}); {todo}")]
    except OSError as error:
        return [Line("problem", "runs", f"{out} cannot be written ({error.strerror or error}); {todo}")]


def caches() -> list[Line]:
    """What dpnb's cache and that of compiled programs hold, and whether they can be written."""
    kept, compiled = cache.folder(), cache.compiled_folder()
    held = f"holds {readable_size(sum(e.size for e in cache.entries()))} of {readable_size(cache.bound())}"
    found = []
    for about, folder, text in (
        ("cache", kept, held if cache.bound() else "is not used, as DPNB_CACHE_GIB is 0"),
        ("compiled", compiled, f"holds {_held(compiled.glob('*'))}"),
    ):
        line = _on_disk(about, folder, text)
        if not os.access(_nearest(folder), os.W_OK | os.X_OK):
            line = Line("note", about, f"{line.text}; nothing is kept there, as it cannot be written")
        found.append(line)
    return found


def data(data_dir: str | None) -> list[Line]:
    """Where TFDS keeps data sets, and whether CIFAR-10 is prepared there."""
    from dpnb.data import DataError, tfds

    root = pathlib.Path(data_dir or tfds.tfds_or_error().core.constants.DATA_DIR).expanduser().absolute()
    line = _on_disk("data", root, f"holds {_held(root.rglob('*'))}")
    try:
        return [line, Line("ok", "cifar10", f"prepared in {tfds.prepared('cifar10', data_dir).data_path}")]
    except DataError as error:
        there = any((root / "cifar10").glob("*/*"))
        return [line, Line("problem" if there else "note", "cifar10", str(error))]


def _held(paths: Iterable[pathlib.Path]) -> str:
    """The size of files together, of the first ten thousand."""
    sizes = [p.lstat().st_size for p in itertools.islice(paths, 10_000) if p.is_file()]
    return f"{'at least ' * (len(sizes) == 10_000)}{readable_size(sum(sizes))}"


def _on_disk(about: str, path: pathlib.Path, text: str) -> Line:
    """A line about a folder, with the free space of its disk; a note if that is little."""
    free = shutil.disk_usage(_nearest(path)).free
    text = f"{path} {text}, {readable_size(free)} free on its disk"
    return Line("note", about, f"{text}; make room there") if free < LITTLE else Line("ok", about, text)


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """The path if it exists, else the lowest of those above it that do."""
    return next(place for place in (path, *path.parents) if place.exists())
