"""Public weights: their sources and training data, their conversion, and how a network starts from them."""

from dpnb.models.weights.catalogue import WEIGHTS, identity, load, names, provenance, saw
from dpnb.models.weights.transfer import Frozen, freeze, load_pretrained_params

__all__ = [
    "WEIGHTS", "Frozen", "freeze", "identity", "load", "load_pretrained_params", "names", "provenance", "saw",
]  # fmt: skip
