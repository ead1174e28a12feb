"""Trains one experiment on an array file, in as many sittings as it takes, with nothing but JAX's own packages.

    python benchmarks/cell.py cifar10/wrn-16-4/eps1 runs/eps1 --data-file cifar10.npz --minutes 9
    python benchmarks/cell.py digits/wrn-10-1 runs/digits --preset smoke                     # two minutes on a CPU

For a borrowed accelerator, where `dpnb run` would need notebooks: it prints what it has spent, stops in time with a
checkpoint, and goes on from there when it is called again.  A finished run leaves its record and its
weights in the folder.
"""

import argparse
import pathlib
import time

from dpnb import experiments, results, training
from dpnb.cli import changes
from dpnb.data import load
from dpnb.training import features, pace


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--preset", default="paper", choices=experiments.PRESETS)
    parser.add_argument("--data-file", help="array file of the data set (default: what the experiment names)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop with a checkpoint after so many")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args(argv)

    began, deadline = time.monotonic(), pace.deadline(args.minutes)
    e = experiments.get(args.name, args.preset, seed=args.seed, **changes(args.set))
    data = features.prepare(e, load(e.dataset, file=args.data_file))
    print(f"{e.name}: data after {time.monotonic() - began:.1f} s", flush=True)
    run = training.train(e, data, args.directory, deadline=deadline)
    made = results.save(run, data, args.directory)
    print(
        f"{e.name}: raw {run.raw.accuracy:.2f} %, EMA {run.ema.accuracy:.2f} %, {run.seconds:.0f} s",
        flush=True,
    )
    print({k: v for k, v in made["privacy"].items() if k.startswith("epsilon")})
    if pace.goes_on(run.stopped):
        print(f"{run.stopped}, by the same command", flush=True)
        raise SystemExit(3)


if __name__ == "__main__":
    main()
