"""Runs many experiments one after another: finished ones are skipped, failures are listed at the end."""

import contextlib
import dataclasses
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from dpnb import experiments, results, training
from dpnb.data import Dataset
from dpnb.experiments import Experiment, field_names
from dpnb.files import shortened
from dpnb.models import weights
from dpnb.results import release
from dpnb.training import cost, features
from dpnb.training.hosts import broadcast_from_process_0, call_on_all, call_on_process_0, have_come_apart
from dpnb.training.session import checked

# Experiments that agree in these fields compile to the same program, so one of them is timed for all.
PROGRAM = ("dataset", "augmult", *field_names("model"), *field_names("performance"))
A_MINUTE = 60.0  # seconds: in less no cell is begun that may take longer


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The outcome of `run`.

    records: of the cells that are finished, in the order of the plan.
    failures: {"name, seed": why}.
    """

    records: list[dict[str, Any]]
    failures: dict[str, str]


def cells(pattern: str, preset: str, **changes) -> list[Experiment]:
    """Returns the experiments whose names match, at a preset and with changes, in the order of the registry.

    Raises:
      KeyError: nothing matches.
      ValueError, TypeError: bad hyper-parameters, or a seed among them.
    """
    if "seed" in changes:
        raise ValueError(f"changes of a sweep must leave seed alone, got {changes['seed']!r}; it is `seeds`")
    names = experiments.names(pattern)
    if not names:
        raise KeyError(f"no experiment matches {pattern!r}; see `dpnb list`")
    return [experiments.get(name, preset, **changes) for name in names]


def scales(pattern: str, preset: str, **changes) -> dict[str, list[Experiment]]:
    """Returns {preset: cells}, with the changes at `preset`, and unchanged at the other presets."""
    found = {preset: cells(pattern, preset, **changes)}
    return found | {other: cells(pattern, other) for other in experiments.PRESETS if other != preset}


def on_record(pattern: str, preset: str, records: list[dict[str, Any]], fields=(), **changes) -> dict:
    """Returns a `results.summary` of each scale of a study that has runs.

    Args:
      records, fields: as for `results.summary`.
      pattern, preset, changes: as for `scales`.
    Returns:
      {scale: pandas.DataFrame}, `preset` first. Presets at which all cells are the same experiments are
      merged, e.g. "teach = colab = paper"; one whose runs are all shown at earlier ones is left out.
    """
    found, same = scales(pattern, preset, **changes), {}
    for scale, at_scale in found.items():
        same.setdefault(tuple(e.fingerprint() for e in at_scale), []).append(scale)
    frames, shown = {}, set()
    for fingerprints, names in same.items():
        frame = results.summary(found[names[0]], records, fields)
        ran = {f for f, n in zip(fingerprints, frame["n"], strict=True) if n}
        if ran - shown:
            frames[" = ".join(names)] = frame
        shown |= ran
    return frames


def plan(pattern: str, preset: str, seeds: int = 1, **changes) -> list[Experiment]:
    """Returns the experiments to run: those of `cells`, once for each of the seeds 0 ... seeds - 1.

    Cells that are the same experiment at this scale under several names are run once, as the first of them.

    Raises:
      KeyError: nothing matches.
      ValueError, TypeError: seeds below 1, bad hyper-parameters, or cells that read different data.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    different = {}
    for e in cells(pattern, preset, **changes):
        different.setdefault(e.fingerprint(), e)
    if len(read := {(e.dataset, e.image_size, e.validation) for e in different.values()}) > 1:
        sets = ", ".join(sorted({name for name, *_ in read}))
        raise ValueError(f"a sweep reads one data set, got those of {pattern!r} ({sets}); narrow the pattern")
    return [e.replace(seed=seed) for seed in range(seeds) for e in different.values()]


def directory(root: str | pathlib.Path, e: Experiment) -> pathlib.Path:
    """Returns the directory of one run: ROOT/NAME/PRESET-seedSEED, and what differs from the registry.

    A name that is too long for a file system ends in a hash of the whole.
    """
    known = (
        experiments.get(e.name, e.preset).identity_fields()
        if e.name in experiments.names()
        else e.identity_fields()
    )
    changed = {key: value for key, value in sorted(e.identity_fields().items()) if value != known[key]}
    which = "secret" if e.seed is None else f"seed{e.seed}"
    name = "-".join([e.preset, which, *(f"{key}={value}" for key, value in changed.items())])
    return pathlib.Path(root) / e.name / shortened(name.replace("/", "_"))


def finished(e: Experiment, data: Dataset, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the record of exactly this experiment and seed on these images, whatever name it ran under.

    It must have started from the same public weights, if any. For a run with a secret seed only the full
    record serves, as the released one names the images by a keyed hash. None if there is no such record.
    """
    same = results.matching_records(e, records)
    if not same:
        return None
    try:
        images, began = features.fingerprint(e, data), weights.provenance(e.pretrained)
    except (KeyError, OSError, ValueError):  # the weights are not available: training will say so
        return None
    same = [
        r
        for r in same
        if (r["seed"], r["data"]["fingerprint"], r.get("pretrained")) == (e.seed, images, began)
    ]
    return same[0] if same else None


def predict(
    todo: list[Experiment], data: Dataset, programs: dict[tuple, Callable] | None = None
) -> dict[Experiment, cost.Cost]:
    """Predicts what each experiment will cost here; compiles and times each different program once.

    A cell that cannot be calibrated or compiled is left out: `run` will say why. `programs` gets what is compiled.
    """
    measured, found, programs = {}, {}, {} if programs is None else programs
    for e in todo:
        key = tuple(getattr(e, name) for name in PROGRAM)
        try:
            if key in measured:
                ready = call_on_all(lambda e=e: training.calibrate(e, len(data.train)))
            else:
                ready, images = call_on_all(lambda e=e: _ready(e, data))
                measured[key] = ready, cost.predict(ready, images, repeats=1, programs=programs)
        except Exception as error:
            if have_come_apart(error):
                raise
            continue
        like, known = measured[key]
        times = ready.steps * ready.expected_batch_size / (like.steps * like.expected_batch_size)
        found[e] = dataclasses.replace(
            known, views=known.views * times, flops=known.flops * times, seconds=known.seconds * times
        )
    return found


def _ready(e: Experiment, data: Dataset) -> tuple[Experiment, Dataset]:
    """Returns the experiment, calibrated and checked, and what its network reads; no process waits for another in it."""
    images = features.prepare(e, data)
    return checked(e, images), images


def budget(e: Experiment, data: Dataset) -> str:
    """Describes in one line what a calibrated experiment will spend on these data."""
    n = len(data.train)
    return (
        f"N {n:,}, q {e.expected_batch_size / n:.4g}, sigma {e.noise_multiplier:.4g}, {e.steps:,} updates: "
        f"epsilon {e.epsilon:.4g} at delta {e.delta:g} ({e.accountant.upper()}, {e.sampler} sampling)"
    )


def run(
    todo: list[Experiment],
    data: Dataset,
    root: str | pathlib.Path,
    say=print,
    deadline: float | None = None,
    place: pathlib.Path | None = None,
) -> Sweep:
    """Trains what is not finished below `root`, says how long it will take, and continues after failures.

    Args:
      todo: from `plan`.
      data: images, as `dpnb.data.load` gives them.
      root: gets one directory per experiment and seed, with checkpoints, ledger and record; with a secret
        seed these are in its `release/` and `private/`.
      say: prints one line.
      deadline: when to have ended, as for `dpnb.training.train`; what is not finished then is left to another call.
      place: the directory of the run, if there is one experiment alone and not where it belongs below `root`.
    Raises:
      Exception: among several processes, what a cell raised on one of them alone, as they have come apart.
    """

    def known():
        records = [*results.load(root), *results.load(root, release.FULL_RECORD)]
        return [finished(e, data, records) for e in todo]

    done = dict(zip(todo, call_on_process_0(known), strict=True))
    left = [e for e in todo if done[e] is None]
    failures, costs, programs = {}, {}, {}
    say(f"{len(todo)} cells, {len(todo) - len(left)} of them finished")
    if left:
        say(
            "compiling and timing each different program: a minute or so, or a moment if compiled here before"
        )
        costs = predict(left, data, programs)
        whole = cost.duration(sum(c.seconds for c in costs.values()))
        unknown = len(left) - len(costs)
        say(
            f"the other {len(left)}: about {whole} of updates on {jax.devices()[0].device_kind}, compilation and "
            f"evaluation come on top{f'; {unknown} cannot be timed, and will say why' * bool(unknown)}"
        )
    took = 0.0  # by the cell before
    for number, e in enumerate(left, 1):
        began = time.monotonic()
        label = f"{e.name}, seed {e.seed}"
        late = deadline and number > 1 and time.monotonic() + min(took, A_MINUTE) > deadline
        if broadcast_from_process_0(int(bool(late))):
            say(f"stopped in time before {label}; the same sweep goes on from there")
            break
        say(f"[{number}/{len(left)}] {label}")
        try:
            ready = call_on_all(lambda e=e: features.prepare(e, data))
            chosen = costs[e].chosen if e in costs else None
            if e in costs:
                say(f"    {budget(training.calibrate(e, len(data.train)), data)}; {costs[e].form}")
            where = place or directory(root, e)
            trained = training.train(e, ready, where, programs=programs, chosen=chosen, deadline=deadline)
            done[e] = results.save(trained, ready, where)
            say(f"    EMA {done[e]['accuracy']['ema']:.2f} %, {trained.seconds / 60:.1f} minutes")
        except Exception as error:  # the other cells are still worth running
            if have_come_apart(error):
                raise
            failures[label] = f"{type(error).__name__}: {error}"
            say(f"    failed: {failures[label]}")
            with contextlib.suppress(OSError):  # it may be the disk that is full
                where = (place or directory(root, e)) / ("private" if e.seed is None else "")
                where.mkdir(mode=0o700 if e.seed is None else 0o777, parents=True, exist_ok=True)
                (where / "failure.txt").write_text(traceback.format_exc())
        took = time.monotonic() - began
    for label, why in failures.items():
        say(f"failed: {label}: {why}")
    return Sweep([r for r in done.values() if r is not None], failures)
