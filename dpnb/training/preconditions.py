"""Refuses bad settings before anything is spent, with random inputs in place of the data."""

import math

import jax
import numpy as np
from flax import nnx

from dpnb.data import Dataset, Photographs
from dpnb.experiments import Experiment
from dpnb.models import functional
from dpnb.training import features


def check_noise(experiment: Experiment) -> None:
    """Refuses unknown noise, and noise that would protect nothing.

    Raises:
      ValueError: noise_multiplier is None, or there is noise but clip_norm is infinite.
    """
    sigma, clip_norm = experiment.noise_multiplier, experiment.clip_norm
    if sigma is None:
        raise ValueError(
            f"{experiment.name}: noise_multiplier must be known, got None; calibrate it (`dpnb.training.calibrate`), "
            "or say 0 for no noise"
        )
    if sigma and not math.isfinite(clip_norm):
        raise ValueError(
            f"{experiment.name}: the noise needs a finite standard deviation, got clip_norm {clip_norm}: a sum that is "
            "not clipped has no finite sensitivity; set clip_norm, or noise_multiplier = 0"
        )


def check_data(experiment: Experiment, data: Dataset) -> None:
    """Checks that the data are those that the record will name, and that accuracy is of the images that it will name.

    Raises:
      ValueError: the data set is another one, or not as many images are held out.
    """
    if data.name != experiment.dataset:
        raise ValueError(
            f"{experiment.name} must be trained on {experiment.dataset}, got {data.name}; load the data that it names, or "
            f"set dataset={data.name!r} and so make it another experiment"
        )
    if experiment.validation and len(data.test) != experiment.validation:
        raise ValueError(
            f"{experiment.name} must report on {experiment.validation:,} held-out training images, got {len(data.test):,} "
            "images; load the data with validation=experiment.validation"
        )


def check_size(experiment: Experiment, data: Dataset) -> None:
    """Checks that photographs have the size that the record will state.

    Raises:
      ValueError: they do not, or `image_size` is set and the images are in memory.
    """
    got = data.shape[0] if isinstance(data.train, Photographs) else 0
    if got != experiment.image_size and not isinstance(data, features.FeatureDataset):
        raise ValueError(
            f"{experiment.name}: image_size is {experiment.image_size}, got "
            f"{f'photographs of {got} pixels' if got else 'images in memory'}; load the data with "
            "image_size=experiment.image_size"
        )


def check_own_model(experiment: Experiment) -> None:
    """Checks that the experiment asks nothing of a model that is passed in, which starts and trains as it is.

    Raises:
      ValueError: it names public weights, a part to train, or a dtype by device, and so would its record.
    """
    if experiment.pretrained or experiment.trainable != "all":
        raise ValueError(
            f"{experiment.name}: a model of your own begins and trains as it is; leave pretrained and "
            f"trainable at their defaults, got {experiment.pretrained!r} and {experiment.trainable!r}"
        )
    if experiment.compute_dtype == "auto":
        raise ValueError(
            f"{experiment.name}: a model of your own computes in the dtype that it was built for; set compute_dtype to that "
            "one (float16 scales the losses), got 'auto'"
        )


def check_outputs(model: nnx.Module, data: Dataset) -> None:
    """Checks that the model takes the images and returns one logit per class.

    Raises:
      ValueError: it raises an error, or its outputs are not [batch, classes].
    """
    images = noise_images(data)
    params, apply = functional(model)
    try:
        outputs = jax.eval_shape(apply, params, images)
    except Exception as error:  # of any kind, from within the model
        raise ValueError(
            f"the model must take images {list(images.shape)}, but it raised {type(error).__name__}: "
            f"{str(error)[:300]}; build it for inputs of the shape {list(data.shape)}"
        ) from error
    got = getattr(outputs, "shape", type(outputs).__name__)
    expected = (len(images), len(data.classes))
    if got != expected:
        raise ValueError(
            f"the model must return one logit for each of {len(data.classes)} classes, {list(expected)}, "
            f"got {list(got) if isinstance(got, tuple) else got}; set its number of classes"
        )


def noise_images(data: Dataset, n: int = 4) -> np.ndarray:
    """Returns random images of the data's shape, float32 [n, h, w, c]; no training data are read."""
    shape = (n, *data.shape)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
