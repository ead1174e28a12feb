"""One sitting on a borrowed accelerator: measures every formulation against the floor, then trains the cell that fits.

    python benchmarks/sitting.py OUT --data-file cifar10.npz --minutes 55
    python benchmarks/sitting.py OUT --cells digits/wrn-10-1 --like digits/wrn-10-1 --preset smoke --minutes 3      # on a CPU

OUT/speed.json gets the microseconds that one view takes in each formulation of the weight gradients, beside the non-private gradient
of the same views (the floor) and the share of the device's measured matrix peak.  It is not measured again on such a device.  With
the minutes that are left, cells are trained one after another: first what an earlier sitting began, then the one with the most
views that still fits; if none does, the one with the fewest is begun, and goes on in the next sitting.  Checkpoints, records
and weights are in OUT/runs/NAME/PRESET-seed0, compiled programs in OUT/compiled.
"""

import argparse
import json
import pathlib
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cell
import jax
import jax.numpy as jnp
from accelerator import ceilings
from clipped_gradient import compiled

from dpnb import data, experiments, sweep
from dpnb.data import Dataset
from dpnb.experiments import Experiment
from dpnb.files import write_atomic
from dpnb.gradients import FORMULATIONS
from dpnb.models.precision import resolve
from dpnb.training import cost, features, make_trainer, pace
from dpnb.training.choice import MANY, time_call
from dpnb.training.loss import make_loss
from dpnb.training.settings import hardware

CELLS = (
    "cifar10/wrn-16-4/*",
    "cifar10/wrn-40-4/*",
    "cifar10/augmult/*",
    "cifar10/batch/*",
    "cifar10/depth-width/*",
)
VIEWS = {"cpu": 32, "gpu": 1024, "tpu": 128}  # a call of the measurement
OVERHEAD = 120.0  # seconds of a cell for compilation, checks, and the evaluation at its end
SLOWER = 1.15  # an update against its gradients alone, as measured on an H100: 19.05 and 17.8 us a view, and a margin
SHARE_OF_MINUTES = 0.4  # after which no other formulation is compiled
LATE = "no time was left"


class Candidate(NamedTuple):
    """A cell, the seconds that it would take from its beginning, and what is there of it: "", "begun" or "finished"."""

    experiment: Experiment
    seconds: float
    state: str = ""


def floor(e: Experiment, images: Dataset, examples: int, repeats: int = 5) -> float:
    """Microseconds a view of the non-private gradient of the mean loss of as many views, at random inputs."""
    trainer = make_trainer(e.replace(physical_batch_size=examples, noise_multiplier=1.0), images, seed=0)
    loss, views = make_loss(trainer.apply), examples * max(e.augmult, 1)
    inputs = jax.random.normal(jax.random.key(1), (views, *images.shape))
    labels = jnp.arange(views) % len(images.classes)
    gradient = jax.grad(lambda p, x, y: loss(p, (x, y))[0].mean())
    program, _ = compiled(gradient, trainer.state.params, inputs, labels)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(program(trainer.state.params, inputs, labels))
        times.append(time.perf_counter() - began)
    return 1e6 * min(times[1:]) / views


def measure(e: Experiment, images: Dataset, known: dict, deadline: float, say: Callable = print) -> dict:
    """What `speed.json` holds: each formulation of this cell's program on masked examples, beside its floor.

    known: what an earlier sitting found on such a device, which is not measured again; else {}.
    """
    device, k = jax.devices()[0], max(e.augmult, 1)
    e = e.replace(noise_multiplier=e.noise_multiplier or 1.0)
    made = known or _nothing_yet(e, images)
    for how in FORMULATIONS:
        if made["formulations"].get(how, {"why": LATE}).get("why") != LATE:
            continue
        if time.monotonic() > deadline:
            made["formulations"][how] = {"why": LATE}
            continue
        began, examples = time.monotonic(), max(1, VIEWS[device.platform] // k)
        if how.startswith("unrolled"):  # which is compiled for each example
            examples = min(examples, MANY)
        if str(examples) not in made["floors"]:
            made["floors"][str(examples)] = floor(e, images, examples)
        candidate = e.replace(physical_batch_size=examples, formulation=how)
        found = time_call(candidate, images, seed=0, devices=jax.devices()[:1])
        row = {"examples": examples, "seconds": time.monotonic() - began}
        if found.microseconds is None:
            row["why"] = found.why
        else:
            row |= {"us_per_view": found.microseconds, "memory": found.memory}
            row["ratio"] = found.microseconds / made["floors"][str(examples)]
            row["share_of_peak"] = made["flops_per_view"] / found.microseconds / 1e-6 / made["peak_flops"]
        made["formulations"][how] = row
        say(
            f"{how}: {json.dumps({n: float(f'{v:.4g}') if isinstance(v, float) else v for n, v in row.items()})}"
        )
    return made


def _nothing_yet(e: Experiment, images: Dataset) -> dict:
    """The terms of a measurement on this device."""
    device, trainer = jax.devices()[0], make_trainer(e, images, seed=0)
    dtype = resolve(e.compute_dtype, device)
    peaks = ceilings(1024 if device.platform == "cpu" else 8192, 5, (dtype,))
    return {
        "device": hardware([device]), "like": e.name, "preset": e.preset, "compute_dtype": dtype,
        "views": max(e.augmult, 1), "peak_flops": peaks[dtype], "floors": {}, "formulations": {},
        "flops_per_view": cost.flops_per_view(trainer.apply, trainer.state.params, images.shape),
    }  # fmt: skip


def fastest(speed: dict) -> float:
    """Microseconds a view in the fastest formulation.

    Raises:
      ValueError: none could be timed.
    """
    timed = [row["us_per_view"] for row in speed["formulations"].values() if "us_per_view" in row]
    if not timed:
        raise ValueError(f"a formulation must have been timed, but: {speed['formulations']}")
    return min(timed)


def candidates(
    patterns: Sequence[str], preset: str, images: Dataset, speed: dict, runs: pathlib.Path
) -> list[Candidate]:
    """The cells that these images serve and whose updates are known, with what they would take here.

    A view of another network takes as many times longer as it has more FLOP.
    """
    from dpnb.results.plan import flops_of, work_of

    different: dict[str, Experiment] = {}
    for pattern in patterns:
        for e in sweep.plan(pattern, preset):
            different.setdefault(e.fingerprint(), e)
    found = []
    for e in different.values():
        suits = (e.dataset, e.on_features, e.pretrained) == (images.name, False, "") and not e.impossible
        if suits and e.steps is not None:
            ratio = flops_of(e)[1] / speed["flops_per_view"]
            seconds = work_of(e).views * fastest(speed) * 1e-6 * ratio * SLOWER + OVERHEAD
            found.append(Candidate(e, seconds, state_of(sweep.directory(runs, e))))
    return found


def state_of(run: pathlib.Path) -> str:
    """Whether a run is "finished" (it may have been refused more updates), "begun", or nothing ("")."""
    record = run / "result.json"
    if record.exists() and not pace.goes_on(json.loads(record.read_text())["stopped"]):
        return "finished"
    return "begun" if (run / "ledger.jsonl").exists() else ""


def choose(found: Sequence[Candidate], seconds: float) -> Candidate | None:
    """What was begun; else the longest cell that fits; else the shortest; None if all are finished."""
    if begun := [c for c in found if c.state == "begun"]:
        return begun[0]
    new = [c for c in found if not c.state]
    fitting = [c for c in new if c.seconds <= seconds]
    if fitting:
        return max(fitting, key=lambda c: c.seconds)
    return min(new, key=lambda c: c.seconds, default=None)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path, help="folder of this and later sittings")
    parser.add_argument("--minutes", type=float, required=True, help="after which all has ended")
    parser.add_argument(
        "--since", type=float, default=time.time(), help="when they began, in seconds of Unix time"
    )
    parser.add_argument("--data-file", help="array file of the data set (default: what --like names)")
    parser.add_argument("--preset", default="paper", choices=experiments.PRESETS)
    parser.add_argument("--like", default="cifar10/wrn-16-4/eps1", help="cell whose program is measured")
    parser.add_argument(
        "--cells", nargs="+", default=CELLS, help="shell patterns of the cells to choose from"
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")

    end = time.monotonic() + args.since + 60 * args.minutes - time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    like = experiments.get(args.like, args.preset)
    images = features.prepare(like, data.load(like.dataset, file=args.data_file))
    file, here = args.out / "speed.json", hardware(jax.devices()[:1])
    speed = json.loads(file.read_text()) if file.exists() else {}
    if [speed.get(name) for name in ("device", "like", "preset")] != [here, like.name, like.preset]:
        speed = {}
    share = SHARE_OF_MINUTES * (end - time.monotonic())
    speed = measure(like, images, speed, time.monotonic() + share)
    write_atomic(file, json.dumps(speed, indent=1) + "\n")
    if not any("us_per_view" in row for row in speed["formulations"].values()):
        print("no time was left to measure anything; the same command goes on")
        return 3
    print(f"{here}: {fastest(speed):.4g} us a view, written to {file}", flush=True)
    failed: set[str] = set()
    while True:
        found, left = (
            candidates(args.cells, args.preset, images, speed, args.out / "runs"),
            end - time.monotonic(),
        )
        chosen = choose([c for c in found if c.experiment.name not in failed], left)
        if chosen is None:
            print(f"failed: {', '.join(sorted(failed))}" if failed else "every cell is finished")
            return 1 if failed else 0
        if left < OVERHEAD / 2:
            print("no time is left for another cell; the same command goes on")
            return 3
        e = chosen.experiment
        print(f"{e.name}: {cost.duration(chosen.seconds)} in all, {cost.duration(left)} left", flush=True)
        given = [e.name, str(sweep.directory(args.out / "runs", e)), "--preset", args.preset]
        given += ["--minutes", str(left / 60)] + (["--data-file", args.data_file] if args.data_file else [])
        try:
            cell.main(given)
        except SystemExit as stopped:
            return int(stopped.code or 0)
        except Exception:  # the others are still worth the minutes
            traceback.print_exc()
            failed.add(e.name)


if __name__ == "__main__":
    raise SystemExit(main())
