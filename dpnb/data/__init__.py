"""Images and labels: CIFAR-10 and CIFAR-100 through TFDS (without TensorFlow), array files, photographs.

A whole data set of small images fits in memory as uint8 (CIFAR-10: 176 MiB) and is copied to the device
unchanged; photographs stay on disk. TFDS, Pillow, Grain and scikit-learn are imported only when used.
"""

from dpnb.data.cifar import prepare
from dpnb.data.dataset import CIFAR10_CLASSES, CLASSES, DataError, Dataset, NotPrepared, Split, Unreachable
from dpnb.data.loading import load, save
from dpnb.data.photographs import PhotographDataset, Photographs
from dpnb.data.recipe import Recipe

__all__ = [
    "CIFAR10_CLASSES", "CLASSES", "DataError", "Dataset", "NotPrepared", "PhotographDataset", "Photographs",
    "Recipe", "Split", "Unreachable", "load", "prepare", "save",
]  # fmt: skip
