"""Two runs that many tests look at, each made once: a tiny one here, a short one through the notebook.

Also the root of the checkout, subprocesses that import it, and an installation of its wheel.
"""

import functools
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import types

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "cifar10_from_scratch.ipynb"
SMALL = (
    "steps=3", "expected_batch_size=24", "eval_every=2", "eval_examples=50", "physical_batch_size=8", "accountant=rdp"
)  # fmt: skip
# In place of what `environment` says: what users have; and what is best where computing and compiling take as long.
DEFAULTS = {"XLA_FLAGS": ""}
OPTIMISED = {"XLA_FLAGS": "--xla_backend_optimization_level=1"}
BUILD = "import sys, hatchling.build; print(getattr(hatchling.build, sys.argv[1])(sys.argv[2]))"
# Collecting garbage takes a tenth of a notebook's time else; and nothing leaves this machine, nor comes from elsewhere.
SITE = """
import gc, socket
gc.set_threshold(100_000, 50, 100)
connect = socket.socket.connect

def connect_here(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise ConnectionRefusedError(f"tests have no network, and {address} was asked for")
    return connect(self, address)

socket.socket.connect = connect_here
"""
_cleanup = []  # temporary directories live as long as the tests do


def temporary(name: str) -> pathlib.Path:
    """A directory that is deleted when the process ends."""
    _cleanup.append(tempfile.TemporaryDirectory(prefix=f"dpnb-{name}-"))
    return pathlib.Path(_cleanup[-1].name)


@functools.cache
def _site() -> str:
    """A folder with a `sitecustomize.py`, which a Python that has the folder on its path runs when it starts."""
    folder = temporary("site")
    (folder / "sitecustomize.py").write_text(SITE)
    return str(folder)


def python_path(*folders) -> str:
    """PYTHONPATH for subprocesses that import from these folders; they collect garbage rarely."""
    return os.pathsep.join([_site(), *map(str, folders)])


@functools.cache
def environment() -> dict[str, str]:
    """For subprocesses: one device, this checkout; compiled programs and answers of calibration are kept for all."""
    changed = {
        "DPNB_CACHE_GIB": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of their time is compilation
        "TFDS_DATA_DIR": str(temporary("no-data")),  # as on a fresh machine
        "PYTHONPATH": python_path(ROOT),
        # What a notebook's own cells call may not be deprecated; warnings of others are their makers' concern.
        "PYTHONWARNINGS": "ignore,error::DeprecationWarning:__main__,error::FutureWarning:__main__",
    }
    return {**os.environ, **changed}


def traced_for(platform: str):
    """A context in which programs are traced as for "PLATFORM" or "PLATFORM: KIND"; they still run on CPU."""
    import jax

    name, _, kind = platform.partition(": ")
    device = jax.sharding.AbstractDevice(kind or name, None, name)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def with_helpers(**changes: str) -> dict[str, str]:
    """The environment for subprocesses that import `tiny` or this file."""
    return {**os.environ, **changes, "PYTHONPATH": python_path(ROOT / "tests", ROOT)}


def count_traces(patch) -> list[int]:
    """A list that gets an entry each time that the loss of a clipped gradient is traced."""
    from dpnb.gradients import ClippedGrad

    times, loss = [], ClippedGrad._mean_loss
    patch.setattr(ClippedGrad, "_mean_loss", lambda *given: times.append(1) or loss(*given))
    return times


_reports = {}


def check_once(check):
    """`check_trainer`, but of trainers of one experiment, shape and configuration of JAX only the first is checked.

    That takes half of a tiny run; for tests of what happens afterwards.
    """
    import jax

    def once(trainer):
        shapes = str(jax.tree.map(lambda p: (p.shape, p.dtype), trainer.state))
        key = trainer.experiment.replace(seed=None), shapes, trainer.mesh, str(jax.config.values)
        if key not in _reports:
            _reports[key] = check(trainer)
        return _reports[key]

    return once


def optimise_scattering(patch) -> None:
    """Scattering features in this process are made by optimised code, in a third of the time."""
    import jax

    from dpnb.models import scattering

    make, options = scattering.make_transform, {"xla_backend_optimization_level": 2}
    made = functools.cache(lambda side: jax.jit(make(side), compiler_options=options))
    patch.setattr(scattering, "make_transform", made)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def python(*arguments, timeout: float = 900, **changes: str) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in its own process and an empty directory; `changes` are to its environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env={**environment(), **changes}, cwd=temporary("cwd"),
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def execute(name, folder, optimised=False, bare=False, **given):
    """Papermill runs notebooks/NAME at preset smoke, without a network or data: the outputs, and all the text in them.

    optimised: what computes more than it compiles is done sooner.
    bare: only `given` differs from the defaults, and the notebook lies in the folder alone, as for somebody who opens it.
    """
    import nbformat
    import yaml

    folder.mkdir(exist_ok=True)
    own = {} if bare else {"preset": "smoke", "output_dir": str(folder)}
    (folder / "parameters.yaml").write_text(yaml.safe_dump({**own, **given}))
    executed = folder / pathlib.Path(name).name
    done = python(
        "-m", "papermill", NOTEBOOK.parent / name, executed, "-f", folder / "parameters.yaml",
        "--cwd", folder, "--no-progress-bar", "-k", "python3", **(OPTIMISED if optimised else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", ())]
    return outputs, "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)


def build(kind: str, tree: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The wheel, sdist or editable wheel of a source tree, in a folder of its own."""
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip()


@functools.cache
def installed() -> types.SimpleNamespace:
    """The wheel of this tree, alone in a folder inside a checkout of something else.

    `run(command, cwd, status)` is what `python COMMAND` with it printed, `dpnb(...)` the same of its command.
    """
    project = temporary("project")
    wheel, site = build("wheel", ROOT, project / "wheel"), project / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*pip, wheel], check=True)
    if shutil.which("git"):
        name = ["-c", "user.name=x", "-c", "user.email=x@x"]
        for arguments in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "theirs"]):
            subprocess.run(["git", *arguments], cwd=project, check=True)

    def run(command, cwd, status=0, **changes):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env={**environment(), "PYTHONPATH": python_path(site), **changes}, cwd=cwd,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr[-3000:]
        return done

    def dpnb(*arguments, cwd, status=0, **changes):
        return run([site / "bin" / "dpnb", *arguments], cwd, status, **changes)

    return types.SimpleNamespace(wheel=wheel, site=site, run=run, dpnb=dpnb)


def installed_files() -> set[pathlib.Path]:
    """What lies in the folder of the installed wheel; runs add nothing to it."""
    return {path for path in installed().site.rglob("*") if "__pycache__" not in path.parts}


@functools.cache
def demo() -> types.SimpleNamespace:
    """`dpnb run digits/wrn-10-1` with the wheel, three updates in two sittings: the working directory, its output
    directory, what each sitting printed."""
    work = temporary("demo")
    before = installed_files()
    sets = [f"--set={pair}" for pair in SMALL]
    command = "run", "digits/wrn-10-1", "--preset=smoke", *sets
    first = installed().dpnb(*command, "--minutes=0.001", cwd=work, status=3)
    done = installed().dpnb(*command, cwd=work)
    assert installed_files() == before
    (record,) = work.rglob("result.json")
    said = dict(stdout=done.stdout, stderr=done.stderr, first=first.stdout)
    return types.SimpleNamespace(work=work, out=record.parent, **said)


@functools.cache
def bands():
    """96 + 60 images of 8x8 in three classes that a stripe of colour tells apart."""
    from dpnb.data import Dataset, Split

    random = np.random.default_rng(0)

    def split(n):
        labels = np.arange(n) % 3
        images = random.integers(0, 40, (n, 8, 8, 3))
        images[np.arange(n), :, :, labels] += 200
        return Split(images.astype(np.uint8), labels)

    return Dataset("bands", split(96), split(60), ("red", "green", "blue"), note="made up")


def linear(*_):
    """The smallest model of `bands` (in place of a Wide-ResNet, whose compilation takes a minute)."""
    import tiny as helpers

    return helpers.Linear(classes=3)


@functools.cache
def tiny() -> types.SimpleNamespace:
    """Six private updates on `bands` with a secret seed, and what `results.save` wrote about them.

    `result` is the full record, `released` what may be published, `secrets` are the seeds that training derived
    from the secret one.
    """
    import jax
    import pytest

    from dpnb import data, results, training
    from dpnb.experiments import Experiment
    from dpnb.results import release
    from dpnb.training import replay, session

    experiment = Experiment(
        name="bands/tiny", dataset="bands", depth=10, width=1, epsilon=8.0, delta=1e-3, steps=6,
        expected_batch_size=48, augmult=0, learning_rate=1.0, physical_batch_size=32, eval_every=3,
        seed=None, preset="smoke", accountant="rdp",
    )  # fmt: skip
    out, file = temporary("tiny"), temporary("data") / "bands.npz"
    data.save(bands(), file)
    derive, derived = session.derived_seed, []
    with pytest.MonkeyPatch.context() as patch:
        for module in (session, replay):
            patch.setattr(
                module, "derived_seed", lambda *given: derived.append(derive(*given)) or derived[-1]
            )
        run = training.train(experiment, bands(), out, model=linear(), devices=jax.devices()[:1])
    released = results.save(run, bands(), out)
    (result,) = results.load(out, release.FULL_RECORD)
    return types.SimpleNamespace(
        run=run, result=result, released=released, out=out, file=file, secrets=derived
    )


# Calibrated noise multipliers of the cells that tests make records of.
SIGMA = {
    ("cifar10/wrn-40-4/eps8", "paper"): 2.32890005274826,
    ("cifar10/wrn-40-4/eps8", "smoke"): 0.48137176028006606,
    ("cifar10/wrn-16-4/eps8", "paper"): 2.5607536617322397,
    ("cifar10/wrn-16-4/eps8", "teach"): 0.6551231922322245,
    ("cifar10/scatter-linear/eps1", "paper"): 11.78666977244791,
    ("cifar10/scatter-linear/eps3", "paper"): 4.480065180472226,
}


def record_of(name: str, preset: str, accuracy: float = 60.0, seed: int | None = 0, **changes) -> dict:
    """The record that a run of a cell of CIFAR-10 would leave: whole and consistent, but nothing was trained.

    changes: to hyper-parameters, which make it another experiment.
    """
    import copy

    from dpnb import experiments

    made = copy.deepcopy(
        _record(experiments.get(name, preset, **{"noise_multiplier": SIGMA[name, preset], **changes}))
    )
    made["seed"] = made["hyper_parameters"]["seed"] = seed
    made["privacy"]["seed_published"] = seed is not None
    made["accuracy"] = {"raw": accuracy, "ema": accuracy}
    made["curve"][-1].update(raw_accuracy=accuracy, ema_accuracy=accuracy)
    return made


@functools.cache
def _record(experiment) -> dict:
    from dpnb import results
    from dpnb.training import Run

    evaluated = types.SimpleNamespace(accuracy=60.0, loss=1.0)
    data = types.SimpleNamespace(
        name="cifar10", train=range(50_000), test=range(10_000), fingerprint="0" * 64, note="made up"
    )
    run = Run(
        experiment=experiment, params={}, ema_params={}, history=[{"step": experiment.steps}], raw=evaluated, ema=evaluated,
        events=[{**vars(experiment.mechanism(50_000)), "steps": experiment.steps}], steps=experiment.steps, seconds=60.0,
        devices="1 x cpu, jax 0", computed_in="float32", evaluated_in="float32", public=None, choices=[], stopped="",
    )  # fmt: skip
    return results.record(run, data)
