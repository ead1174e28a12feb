"""How many photographs a core reads, decodes and resizes, and how many cores an accelerator needs.

    python benchmarks/photographs.py imagenette_mini --data-dir DIR --size 224

Photographs per second of *processor time*, so that other programs do not matter; the wall clock of all
cores beside it.  What an accelerator takes is the registry's assumption of 100 TFLOP/s.
"""

import argparse
import time

import numpy as np

from dpnb import data
from dpnb.data import prefetch
from dpnb.experiments import imagenet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="as for dpnb.data.load")
    parser.add_argument("--data-dir")
    parser.add_argument("--size", type=int, default=224, help="pixels of a view's side")
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    loaded = data.load(args.name, data_dir=args.data_dir, image_size=args.size)
    split = loaded.train.resized(loaded.recipe.enlarged)
    split.read(np.arange(8), np.ones(8, bool))  # opens the files
    count, began = 0, time.process_time()
    while time.process_time() - began < args.seconds:
        indices = np.random.default_rng(count).integers(0, len(split), 16)
        split.read(indices, np.ones(16, bool))
        count += 16
    rate = count / (time.process_time() - began)
    print(f"{loaded.name}, squares of {split.size} px: {rate:.0f} photographs per second of a core's time")
    wall = time.monotonic()
    read = sum(len(labels) for _, labels in split.batches(16))
    cores = prefetch.cores()
    print(
        f"read ahead by Grain on {cores} cores: {read / (time.monotonic() - wall):.0f} per second of wall clock"
    )
    for views in (1, 4, 16):
        hungry = imagenet.EFFECTIVE / (6 * imagenet.FORWARD["nf-resnet", 50, 224] * views)
        print(
            f"NF-ResNet-50, K = {views}, at an assumed {imagenet.EFFECTIVE / 1e12:.0f} TFLOP/s: {hungry:,.0f} per second, "
            f"{hungry / rate:.1f} cores"
        )


if __name__ == "__main__":
    main()
