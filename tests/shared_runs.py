"""Two runs that many tests look at, each made once: a tiny one here, a short one through the notebook."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "cifar10_from_scratch.ipynb"
SMALL = ("steps=3", "expected_batch_size=24", "eval_every=2", "eval_examples=50", "physical_batch_size=8")
_cleanup = []  # temporary directories live as long as the tests do


def temporary(name: str) -> pathlib.Path:
    """A directory that is deleted when the process ends."""
    _cleanup.append(tempfile.TemporaryDirectory(prefix=f"dpnb-{name}-"))
    return pathlib.Path(_cleanup[-1].name)


@functools.cache
def environment() -> dict[str, str]:
    """For subprocesses: one device, this checkout; the compilation cache is that of all tests."""
    changed = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # most of their time is compilation
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    return {**os.environ, **changed}


def python(*arguments, timeout: float = 900) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in its own process and an empty directory."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(), cwd=temporary("cwd"),
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def execute(name, folder, **given):
    """Papermill runs notebooks/NAME at preset smoke: the outputs, and all the text in them."""
    import nbformat
    import yaml

    folder.mkdir(exist_ok=True)
    (folder / "parameters.yaml").write_text(
        yaml.safe_dump({"preset": "smoke", "output_dir": str(folder), **given})
    )
    executed = folder / pathlib.Path(name).name
    done = python(
        "-m", "papermill", NOTEBOOK.parent / name, executed, "-f", folder / "parameters.yaml",
        "--cwd", folder, "--no-progress-bar", "-k", "python3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for cell in nbformat.read(executed, 4).cells for o in cell.get("outputs", ())]
    return outputs, "".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in outputs)


@functools.cache
def demo() -> types.SimpleNamespace:
    """`dpnb run digits/demo`, three updates long: its output directory, what it printed, how it ended."""
    out = temporary("demo")
    sets = [f"--set={pair}" for pair in SMALL]
    done = python("-m", "dpnb.cli", "run", "digits/demo", "--preset=smoke", *sets, f"--out={out}")
    return types.SimpleNamespace(out=out, stdout=done.stdout, stderr=done.stderr, returncode=done.returncode)


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
    from flax import nnx

    class Linear(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(192, 3, rngs=nnx.Rngs(0))

        def __call__(self, images):
            return self.layer(images.reshape(len(images), -1))

    return Linear()


@functools.cache
def tiny() -> types.SimpleNamespace:
    """Six private updates on `bands` with a secret seed, and what `results.save` wrote about them.

    `secrets`: the seeds that training derived from the secret one.
    """
    import jax
    import pytest

    from dpnb import data, replay, results, training
    from dpnb.experiments import Experiment

    experiment = Experiment(
        name="bands/tiny", dataset="bands", depth=10, width=1, epsilon=8.0, delta=1e-3, steps=6,
        expected_batch_size=48, augmult=0, learning_rate=1.0, physical_batch_size=32, eval_every=3,
        seed=None, preset="smoke", accountant="rdp",
    )  # fmt: skip
    out, file = temporary("tiny"), temporary("data") / "bands.npz"
    data.save(bands(), file)
    derive, derived = training.derived_seed, []
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, replay):
            patch.setattr(module, "derived_seed", lambda *given: derived.append(derive(*given)) or derived[-1])
        run = training.train(experiment, bands(), out, model=linear(), devices=jax.devices()[:1])
    result = results.save(run, bands(), out)
    return types.SimpleNamespace(run=run, result=result, out=out, file=file, secrets=derived)
