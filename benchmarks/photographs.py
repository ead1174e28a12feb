"""What photographs cost: a list of them, their fingerprint, decoding, reading ahead; beside a floor of each.

    python benchmarks/photographs.py                                    # 1,280,000 made files, then deleted
    python benchmarks/photographs.py --files 20000                      # fewer
    python benchmarks/photographs.py imagenette_mini --data-dir DIR     # decoding and reading ahead alone

Times are *processor time*, so that other programs matter little, and the wall clock beside it where programs
wait for the disk.  A floor is the least that has to be done, in the same process and minute: the names of all
files, their times of change, their bytes, JPEG decoded but not resized.  The ratio to it is what to compare
between machines and versions: PYTHONPATH chooses another version of dpnb.
"""

import argparse
import dataclasses
import io
import os
import pathlib
import resource
import tempfile
import time
import warnings

import numpy as np
from PIL import Image

from dpnb import data, experiments
from dpnb.data import prefetch
from dpnb.results import plan

A_CLASS = 1280  # photographs in a folder
DIFFERENT = 32  # photographs in a folder that are files of their own; the others are hard links to them


def timed(work, *args):
    """Returns (result, seconds of processor time, seconds of wall clock)."""
    cpu, wall = time.process_time(), time.monotonic()
    result = work(*args)
    return result, time.process_time() - cpu, time.monotonic() - wall


def against(what: str, cpu: float, wall: float, floor: tuple, of: str) -> None:
    print(
        f"{what}: {cpu:.2f} s, {cpu / floor[1]:.1f} times {of} ({floor[1]:.2f} s); "
        f"wall clock {wall:.2f} s, {wall / floor[2]:.1f} times"
    )


def photograph(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Returns a JPEG file of about 45 kB, as ImageNet's are in size and detail."""
    random = np.random.default_rng(seed)
    image = sum(
        np.asarray(
            Image.fromarray(random.integers(0, 256, (height // k, width // k, 3), np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        * weight
        for k, weight in ((50, 0.7), (10, 0.2), (3, 0.1))
    )
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tree(root: pathlib.Path, files: int, different: int) -> None:
    """Writes `files` photographs to train on, most of them hard links, and a few to report on."""
    encoded = photograph(0)
    for which, count in (("train", files), ("val", 2 * max(1, files // A_CLASS))):
        a_class = A_CLASS if which == "train" else 2
        for number in range(count):
            path = root / which / f"{number // a_class:04}" / f"{which}_{number:08}.JPEG"
            place = number % a_class
            if place < different:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded + f"{which} {number}".encode())  # behind the end of the image
            else:
                os.link(path.with_name(f"{which}_{number - place + place % different:08}.JPEG"), path)


def paths(root: pathlib.Path) -> list[str]:
    return [
        entry.path
        for which in ("train", "val")
        for folder in (root / which).iterdir()
        for entry in os.scandir(folder)
    ]


def peak() -> float:
    """Returns the most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget(files: list[str]) -> None:
    """Makes the system forget the contents of files, so that the disk is asked for them again."""
    os.sync()
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[str]) -> None:
    for path in files:
        with open(path, "rb", buffering=0) as file:
            file.read()


def folders(files: int) -> None:
    """Times the list of a folder of folders, and its fingerprint again and again."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory) / "made"
        write_tree(root, files, DIFFERENT)
        os.environ["XDG_CACHE_HOME"] = directory
        open_it = lambda: data.load("made", data_dir=directory, image_size=224)
        before = peak()
        loaded, *list_times = timed(open_it)
        memory = peak() - before
        floor = timed(lambda: sum(map(len, paths(root))))
        against(f"list of {len(loaded.train):,} files, {memory:.0f} MiB", *list_times, floor, "their names")
        names = paths(root)
        _, *first = timed(lambda: loaded.fingerprint)
        against("first fingerprint", *first, timed(read_all, names), "reading them")
        floor = timed(lambda: [os.stat(path) for path in names])
        again = open_it()
        against(
            "fingerprint, opened again",
            *timed(lambda: again.fingerprint)[1:],
            floor,
            "asking for their times",
        )
        against(
            "fingerprint, once more", *timed(lambda: again.fingerprint)[1:], floor, "asking for their times"
        )


def cold(files: int) -> None:
    """Times the first fingerprint of files that the disk has to be asked for."""
    with tempfile.TemporaryDirectory() as directory:
        write_tree(pathlib.Path(directory) / "made", files, A_CLASS)
        os.environ["XDG_CACHE_HOME"] = directory
        loaded, names = (
            data.load("made", data_dir=directory, image_size=224),
            paths(pathlib.Path(directory) / "made"),
        )
        forget(names)
        floor = timed(read_all, names)
        forget(names)
        _, *times = timed(lambda: loaded.fingerprint)
        against(f"first fingerprint of {files:,} cold files", *times, floor, "reading one after another")


def decoding(split, seconds: float) -> float:
    """Times decoding and resizing; returns photographs per second of a core's time."""
    rows, began, whole, floor = np.ones(16, bool), time.process_time(), [], []
    split.read(np.arange(16) % len(split), rows)  # opens the files
    while time.process_time() - began < seconds:
        indices = np.arange(16 * len(whole), 16 * len(whole) + 16) % len(split)
        encoded = [split.source[split.chosen[row]][0] for row in indices]
        whole.append(timed(split.read, indices, rows)[1] / 16)
        floor.append(timed(lambda: [Image.open(io.BytesIO(file)).load() for file in encoded])[1] / 16)
    best, median = min(whole), np.median(np.divide(whole, floor))
    print(
        f"squares of {split.size} px: {1e3 * best:.2f} ms at best, {1 / best:.0f} a second of a core's time; "
        f"{median:.2f} times decoding alone (median)"
    )
    return 1 / best


def reading_ahead(split, batches: int = 30, times: int = 3) -> None:
    """Times threads and processes that read ahead, in turn, in photographs per second of wall clock."""
    parts = [
        np.arange(16 * number, 16 * number + 16, dtype=np.int32) % len(split) for number in range(batches)
    ]
    best = dict.fromkeys((0, prefetch.cores()), 0.0)
    for workers in list(best) * times:
        ahead = dataclasses.replace(split, workers=workers)._ahead(prefetch.GivenBatches(parts))
        next(ahead)  # begins
        _, _, wall = timed(lambda: [next(ahead) for _ in range(batches - 1)])
        ahead.close()
        best[workers] = max(best[workers], 16 * (batches - 1) / wall)
    for workers, rate in best.items():
        who = f"{workers} processes" if workers else "threads"
        print(f"read ahead by {who} on {prefetch.cores()} cores: {rate:.0f} a second at best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="as for dpnb.data.load; made files if left out")
    parser.add_argument("--data-dir")
    parser.add_argument("--files", type=int, default=1_280_000, help="how many to make")
    parser.add_argument("--cold", type=int, default=10_000, help="how many to make and read from the disk")
    parser.add_argument("--size", type=int, default=224, help="pixels of a view's side")
    parser.add_argument("--seconds", type=float, default=10.0, help="of decoding")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of copies: the links
    with tempfile.TemporaryDirectory() as directory:
        if args.name is None:
            folders(args.files)
            cold(args.cold)
            write_tree(pathlib.Path(directory) / "made", 256, 256)
        loaded = data.load(args.name or "made", data_dir=args.data_dir or directory, image_size=args.size)
        split = loaded.train.resized(loaded.recipe.enlarged)
        rate = decoding(split, args.seconds)
        reading_ahead(split)
    for views in (1, 4, 16):
        e = experiments.get("imagenet/scratch/nf-resnet-50/eps8", augmult=views)
        hungry = e.steps * e.expected_batch_size / 3600 / plan.on("H100", e).hours
        print(
            f"NF-ResNet-50, K = {views}, one H100 (computed, see `dpnb plan`): {hungry:,.0f} per second, "
            f"{hungry / rate:.1f} cores"
        )


if __name__ == "__main__":
    main()
