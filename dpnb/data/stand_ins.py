"""Photographs for trying the pipeline end to end: a small data set in memory, written as JPEG files."""

import pathlib

import numpy as np

from dpnb.data.dataset import Dataset, Split


def write_stand_ins(name: str, root: str | pathlib.Path) -> pathlib.Path:
    """Writes a small data set in memory ("digits") as JPEG files below `root`, unless they are there already.

    Returns:
      `root`, the data_dir to load them from.
    """
    from dpnb import data

    root = pathlib.Path(root)
    if not (root / name).exists():
        write_folders(data.load(name), root / name)
    return root


def write_folders(
    dataset: Dataset, root: str | pathlib.Path, side: int = 80, limit: int = 400
) -> pathlib.Path:
    """Writes a data set in memory as JPEG files ROOT/train/CLASS/n.jpeg and ROOT/val/CLASS/n.jpeg.

    Args:
      side: pixels of the shorter side; the longer one is a quarter longer, filled with mirrored pixels.
      limit: at most this many images of each split.
    Returns:
      `root`.
    """
    from PIL import Image

    root = pathlib.Path(root)
    for which, split in (("train", dataset.train), ("val", dataset.test)):
        split: Split = split.head(limit)
        for name in dataset.classes:
            (root / which / name).mkdir(parents=True, exist_ok=True)
        for number, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
            wide = np.pad(pixels, ((0, 0), (pixels.shape[1] // 8,) * 2, (0, 0)), mode="symmetric")
            image = Image.fromarray(wide).resize((side * wide.shape[1] // wide.shape[0], side))
            image.save(root / which / dataset.classes[label] / f"{number:05}.jpeg", quality=95)
    return root
