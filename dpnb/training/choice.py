"""Chooses by measuring how an accelerator computes: how many examples at a time, in which formulation.

Both change a sum by rounding only. Candidates are timed on masked examples, so that no privacy is spent. What was found is
kept in the folder of the run, and a run that goes on on the same hardware goes on with it.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from dpnb.data import Dataset
from dpnb.experiments import Experiment, field_names
from dpnb.experiments.experiment import FORMULATIONS as ALL_FORMULATIONS
from dpnb.files import write_atomic
from dpnb.models.precision import resolved
from dpnb.training.devices import free_memory, memory_of
from dpnb.training.hosts import any_process, call_on_process_0
from dpnb.training.settings import hardware
from dpnb.training.update import make_trainer, masked_batch

FILE = "choice.json"
SECONDS = 60.0  # after which no other candidate is compiled
SHARE = 0.6  # of the free memory that a call may take
GAIN = 1.02  # by which more examples a call must be faster
MANY = 16  # examples, beyond which to compile what is unrolled over them takes minutes
VIEWS = {"gpu": (512, 2048, 4096), "tpu": (128, 256, 512)}  # a call, in the order in which they are tried
FORMULATIONS = {
    "gpu": ("auto", "grouped_im2col", "im2col", "unrolled", "sliced"),
    "tpu": ("auto", "unrolled", "sliced"),
}
# What decides about a program, beside the devices.
DECISIVE = (*field_names("model"), "augmult", "dataset", "form", "remat", "shard")


class Timing(NamedTuple):
    """One candidate: microseconds for one view on one device, or None and why not; bytes of a call, if known."""

    physical_batch_size: int
    formulation: str
    microseconds: float | None
    memory: int | None = None
    why: str = ""

    def __str__(self) -> str:
        what = f"{self.physical_batch_size} examples a call, {self.formulation}"
        if self.microseconds is None:
            return f"{what}: {self.why}"
        return f"{what}: {self.microseconds:.4g} us a view, {(self.memory or 0) / 2**30:.1f} GiB"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen on these devices for this program, and all that was measured for it.

    program: hash of what decides about it, see `program_of`.
    run: fingerprint of the experiment in whose folder it is kept.
    """

    devices: str
    program: str
    run: str
    physical_batch_size: int
    formulation: str
    timings: list[Timing]

    @classmethod
    def read(cls, text: str) -> "Choice | None":
        """Reads what `to_json` wrote; None if it is damaged, or of another version."""
        try:
            fields = json.loads(text)
            made = cls(**{**fields, "timings": [Timing(**t) for t in fields["timings"]]})
            valid = made.physical_batch_size >= 1 and made.formulation in ALL_FORMULATIONS
        except (ValueError, TypeError, KeyError):
            return None
        return made if valid else None

    def to_json(self) -> str:
        """Writes it as JSON."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Returns it in plain JSON values."""
        return {**vars(self), "timings": [t._asdict() for t in self.timings]}

    def apply(self, experiment: Experiment) -> Experiment:
        """Returns the experiment, computed in this way."""
        return experiment.replace(physical_batch_size=self.physical_batch_size, formulation=self.formulation)


def is_open(experiment: Experiment, devices: list[jax.Device]) -> bool:
    """Returns whether there is something to choose: on an accelerator, unless the experiment says it all."""
    decided = experiment.physical_batch_size and experiment.formulation != "auto"
    return devices[0].platform in VIEWS and not decided and not experiment.on_features


def settle(
    experiment: Experiment,
    data: Dataset,
    folder: pathlib.Path,
    devices: list[jax.Device],
    given: Choice | None = None,
    **terms,
) -> Choice | None:
    """Returns the choice of the run in `folder`: the one it made before on such devices, or one that is measured here.

    Args:
      experiment: calibrated.
      folder: of the run; the choice is kept there.
      given: what was measured before, if it was.
      terms: `model` and `programs`, as for `dpnb.training.update.make_trainer`.
    Returns:
      The choice, the same on every process; None if there is nothing to choose.
    """
    if not is_open(experiment, devices):
        return None
    file = folder / FILE
    text = call_on_process_0(lambda: file.read_text(errors="replace") if file.exists() else "")
    kept, run = Choice.read(text) if text else None, experiment.fingerprint()
    if text and kept is None:
        warnings.warn(f"{file} is damaged, or of another version; it is measured again", stacklevel=2)
    for choice in (kept, given):
        if choice and _fits(choice, experiment, devices):
            break
    else:
        choice = measure(experiment, data, devices, **terms)
    choice = dataclasses.replace(choice, run=run)
    if (
        kept is None or kept.run == run
    ):  # another experiment, which will be refused in this folder, leaves it alone
        call_on_process_0(lambda: write_atomic(file, choice.to_json()))
    return choice


def program_of(experiment: Experiment, devices: list[jax.Device]) -> str:
    """Returns the SHA-256 (hex) of what decides which choice is best on such devices."""
    here = resolved(experiment, devices[0])
    terms = {name: getattr(here, name) for name in DECISIVE}
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def _fits(choice: Choice, experiment: Experiment, devices: list[jax.Device]) -> bool:
    """Returns whether a choice was made on such devices, for this program, and for what the experiment says."""
    same = (choice.devices, choice.program) == (hardware(devices), program_of(experiment, devices))
    same &= experiment.physical_batch_size in (None, choice.physical_batch_size)
    return same and experiment.formulation in ("auto", choice.formulation)


def measure(
    experiment: Experiment,
    data: Dataset,
    devices: list[jax.Device],
    *,
    model: nnx.Module | None = None,
    programs: dict[tuple, Callable] | None = None,
    say: Callable[[str], Any] = print,
) -> Choice:
    """Compiles and times candidates for about a minute, and returns the fastest that fits the memory.

    First more and more examples a call, as long as that is faster; then other formulations. Process 0 decides.

    Raises:
      MemoryError: not even one example at a time is possible.
    """
    terms = dict(seed=0, model=model, devices=devices, programs={} if programs is None else programs)
    began, views, platform = time.monotonic(), max(experiment.augmult, 1), devices[0].platform
    timings: list[Timing] = []

    def attempt(size: int, how: str) -> Timing:
        e = experiment.replace(physical_batch_size=size, formulation=how)
        # What is asked for may take all of the memory.
        share = None if experiment.physical_batch_size else SHARE
        mine = time_call(e, data, share=share, **terms)
        found = Timing(**call_on_process_0(lambda: mine._asdict()))
        if any_process(mine.microseconds is None):
            found = found._replace(microseconds=None, why=found.why or "not on every process")
        timings.append(found)
        if jax.process_index() == 0:
            say(f"choosing: {found}")
        return found

    def late() -> bool:
        return call_on_process_0(lambda: time.monotonic() - began > SECONDS)

    how = experiment.formulation
    if size := experiment.physical_batch_size:
        best = attempt(size, how)
    else:
        sizes = sorted({max(1, v // views) for v in VIEWS[platform]})
        best = attempt(sizes[0], how)
        while best.microseconds is None and best.physical_batch_size > 1:
            best = attempt(best.physical_batch_size // 2, how)
        for size in sizes[1:] if best.physical_batch_size == sizes[0] else ():
            if late():
                break
            found = attempt(size, how)
            if found.microseconds is None or found.microseconds * GAIN > best.microseconds:
                break
            best = found
    if best.microseconds is None:
        raise MemoryError(
            f"{experiment.name}: {best.physical_batch_size} examples a call must be possible on {hardware(devices)}, but: "
            f"{best.why}; if it is the memory, use remat=true, more devices with shard=true, or fewer views"
        )
    for other in FORMULATIONS[platform] if how == "auto" else ():
        if other == how or (other == "unrolled" and best.physical_batch_size > MANY) or late():
            continue
        attempt(best.physical_batch_size, other)
    fitting = [t for t in timings if t.microseconds is not None]
    best = min(fitting, key=lambda t: t.microseconds)
    if jax.process_index() == 0:
        say(f"chosen: {best}")
    program = program_of(experiment, devices)
    run = experiment.fingerprint()
    return Choice(hardware(devices), program, run, best.physical_batch_size, best.formulation, timings)


def time_call(
    experiment: Experiment, data: Dataset, *, share: float | None = SHARE, repeats: int = 3, **terms
) -> Timing:
    """Times one physical batch of masked examples on this process, the best of some repeats.

    Args:
      share: of the free memory that it may take; None for whatever can be had.
      terms: as for `dpnb.training.update.make_trainer`.
    """
    size, how = experiment.physical_batch_size, experiment.formulation
    trainer = make_trainer(experiment, data, **terms)
    args = masked_batch(trainer, size)
    try:
        compiled = trainer.accumulate.lower(*args).compile()
        memory = memory_of(compiled)
        mine = next(d for d in trainer.mesh.devices.flat if d.process_index == jax.process_index())
        if share and memory > share * free_memory(mine):
            return Timing(size, how, None, memory, f"takes more than {share:.0%} of the free memory")
        seconds, total = [], args[1]
        for _ in range(repeats + 1):  # the first call warms up
            began = time.monotonic()
            total = jax.block_until_ready(trainer.accumulate(args[0], total, *args[2:]))
            seconds.append(time.monotonic() - began)
    except jax.errors.JaxRuntimeError as error:  # no memory, or not implemented for this device
        return Timing(size, how, None, why=str(error).splitlines()[0][:200])
    return Timing(size, how, 1e6 * min(seconds[1:]) / (size * max(experiment.augmult, 1)), memory)
