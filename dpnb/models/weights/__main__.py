"""Lists public weights, converts published files to safetensors, and learns filters of patches.

python -m dpnb.models.weights list
python -m dpnb.models.weights convert wrn-40-4-imagenet32 WRN_40_4_IMAGENET32.dill wrn.safetensors
python -m dpnb.models.weights pack runs/pretrain/textures/teach-seed0/ema.safetensors OUT.safetensors
python -m dpnb.models.weights learn dead-leaves OUT.safetensors
"""

import argparse
import hashlib
import pathlib
import sys

from dpnb import data
from dpnb.files import write_atomic
from dpnb.models.weights.catalogue import OURS, WEIGHTS, converted, pack
from dpnb.models.weights.patches import learnt


def main(arguments: list[str] | None = None) -> int:
    """Lists the catalogue, or converts or packs a file and prints its hash; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dpnb.models.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, sources, licences, and what each network saw")
    add = commands.add_parser("convert", help="a published file to safetensors")
    add.add_argument("name", choices=WEIGHTS)
    add.add_argument("published", type=pathlib.Path)
    add.add_argument("out", type=pathlib.Path)
    add = commands.add_parser("pack", help="a file of ours in half precision")
    add.add_argument("published", type=pathlib.Path, help="ema.safetensors of a run")
    add.add_argument("out", type=pathlib.Path)
    add = commands.add_parser("learn", help="filters of patches from public images (network patch-linear)")
    add.add_argument("published", metavar="data", help="dead-leaves, textures, or the name of a data set")
    add.add_argument("out", type=pathlib.Path)
    add.add_argument("--data-dir", type=pathlib.Path, help="TFDS directory")
    add.add_argument("--saw", help="what the images are, in words, for whoever uses the weights")
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, w in WEIGHTS.items():
            print(f"{name}: {w.network}, {w.num_classes} classes, saw {w.saw}; inputs {w.inputs}")
            print(
                f"    {w.url or OURS} ({w.licence}), SHA-256 of the converted file: {w.sha256 or 'not on record'}"
            )
        return 0
    try:
        if options.command == "pack":
            content = pack(options.published)
        elif options.command == "learn":
            content = learnt(data.load(options.published, data_dir=options.data_dir), options.saw)
        else:
            content = converted(options.published, options.name)
    except (OSError, KeyError, ValueError) as error:
        print(f"{options.published}: {error}", file=sys.stderr)
        return 2
    write_atomic(options.out, content)
    print(f"{options.out}: SHA-256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
