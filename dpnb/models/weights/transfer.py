"""Prepares a network for private fine-tuning: loads public weights into it, and freezes a part of them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpnb.models.weights.conversion import Arrays


class Frozen(nnx.Variable):
    """A parameter that is not trained: it is no `nnx.Param`, and `dpnb.models.functional` leaves it alone."""


def load_pretrained_params(model: nnx.Module, weights: Arrays) -> None:
    """Sets every parameter of `model` to the public one of that name, except those of the classifier.

    A new data set has other classes; the paper, too, resets the classifier before fine-tuning.

    Args:
      weights: {"blocks/0/conv1/kernel": array, ...}, from `dpnb.models.weights.catalogue.load`.
    Raises:
      ValueError: names or shapes are not this network's, or values are not finite; nothing is set then.
    """
    places = {name: place for name, place in _parameters(model).items() if not name.startswith("linear/")}
    given = {name: array for name, array in weights.items() if not name.startswith("linear/")}
    shapes = {name: getattr(module, leaf).shape for name, (module, leaf) in places.items()}
    wrong = sorted(
        name
        for name in places.keys() | given.keys()
        if name not in given or shapes.get(name) != given[name].shape
    )
    if wrong:
        name = wrong[0]
        got = given[name].shape if name in given else "nothing"
        raise ValueError(
            f"the public weights must be this network's, but {name} should be {shapes.get(name, 'absent')}, "
            f"got {got} (and {len(wrong) - 1} more); set depth, width, norm and standardised as they were there"
        )
    if not all(np.isfinite(array).all() for array in given.values()):
        raise ValueError(
            "the public weights must be finite, got NaN or infinity among them; train them again"
        )
    for name, (module, leaf) in places.items():
        setattr(module, leaf, nnx.Param(jnp.asarray(given[name], jnp.float32)))


def freeze(model: nnx.Module, trainable: str) -> None:
    """Freezes all but the last k residual blocks, the last norm or convolution, and the classifier.

    Args:
      trainable: "all" (nothing is frozen), or "last-k" with k at most the number of blocks.
    Raises:
      ValueError: the network has fewer blocks.
    """
    if trainable == "all":
        return
    last, blocks = int(trainable.removeprefix("last-")), len(getattr(model, "blocks", ()))
    if last > blocks:
        other = f"last-{blocks}, or all" if blocks else "classifier, or all"
        raise ValueError(f"{trainable}: the network has {blocks} blocks; use {other}")
    trained = ("norm/", "final/", "linear/", *(f"blocks/{i}/" for i in range(blocks - last, blocks)))
    for name, (module, leaf) in _parameters(model).items():
        if not name.startswith(trained):
            setattr(module, leaf, Frozen(getattr(module, leaf)[...]))


def _parameters(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Returns {"blocks/0/conv1/kernel": (the convolution, "kernel"), ...}."""
    return {
        "/".join(map(str, (*path, leaf))): (module, leaf)
        for path, module in nnx.iter_modules(model)
        for leaf, value in vars(module).items()
        if isinstance(value, nnx.Param)
    }
