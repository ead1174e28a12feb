"""The table of networks: a new one is its module and one line here.

An experiment names its network; whatever differs from network to network is a column of this table, and nobody
else asks for a name. Modules are imported when their network is built, so that reading the table needs no JAX.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

_WIDE = ("depth", "width", "norm", "standardised", "relu_first", "compute_dtype")
_FREE = ("network", "depth", "width", "compute_dtype")


@dataclasses.dataclass(frozen=True)
class Network:
    """One line of the table; `experiment` is any object with the fields of `dpnb.experiments.Experiment`.

    build: (experiment, num_classes, rngs) -> nnx.Module of images float [batch, h, w, 3] -> logits; or the name of
      such a function, "MODULE:FUNCTION" in `dpnb.models`. For `trainable="classifier"` the module has a method
      `features(images)`, which is what its last layer reads, and for `trainable="last-k"` a list `blocks`; its
      last layer is the attribute `linear`.
    label: its name in tables; {depth} and other fields are filled in, and {scaled} says by how much a network is
      wider than the published one, and its pixels.
    feature_size: numbers that the classifier reads from one image, at width 1.
    kind, identity: what it is called, and the fields that decide about its features beside the weights. Both
      are hashed into the fingerprints of features: in a line that has records they never change.
    feature_batch: images per call when features are computed.
    fixed: the module in `dpnb.models` that makes the fixed features which it reads instead of images: `WORDS`
      (hashed, as `kind`) and `make_transform(side)`; "" if it reads images.
    """

    build: str | Callable[[Any, int, Any], Any]
    label: str
    feature_size: int = 0
    kind: str = ""
    identity: tuple[str, ...] = ()
    feature_batch: int = 500
    fixed: str = ""


def _free(build: str, label: str, size: int) -> Network:
    return Network(build, label + "{scaled}", size, "normaliser-free network", _FREE, feature_batch=32)


NETWORKS = {
    "wrn": Network("wide_resnet:build", "WRN-{depth}-{width}", 64, "Wide-ResNet", _WIDE),
    "scatter-linear": Network("scattering:build", "scatter-linear", fixed="scattering"),
    "nf-resnet": _free("nf_resnet:build", "NF-ResNet-{depth}", 2048),
    "nf-resnet-timm": _free("nf_resnet:build_as_timm", "NF-ResNet-timm-{depth}", 2048),
    "nfnet-f0": _free("nfnet:build", "NFNet-F0", 3072),
    "nfnet-f1": _free("nfnet:build", "NFNet-F1", 3072),
    "nfnet-f3": _free("nfnet:build", "NFNet-F3", 3072),
}


def find_network(name: str) -> Network:
    """The line of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {tuple(NETWORKS)}, got {name!r}")
    return NETWORKS[name]


def label(experiment) -> str:
    """ "WRN-16-4", "NF-ResNet-14 (width 0.25, 64 px)"."""
    e = experiment
    scaled = f" (width {e.width:g}, {e.image_size or 32} px)" if e.width != 1 else ""
    return find_network(e.network).label.format(**vars(e), scaled=scaled)


def feature_size(experiment) -> int:
    """Numbers that the classifier reads from one image."""
    return int(find_network(experiment.network).feature_size * experiment.width)


def make_model(experiment, num_classes: int, rngs):
    """What the experiment trains, as an nnx.Module: its network, or the last layer alone, on features.

    Args:
      rngs: nnx.Rngs, for initial parameters.
    Raises:
      KeyError, ValueError, OSError: public weights that cannot be had, or are another network's.
    """
    from dpnb.models import weights
    from dpnb.models.scattering import ScatterLinear

    if experiment.trainable == "classifier":
        return ScatterLinear(num_classes, (feature_size(experiment),))
    model = make_network(experiment, num_classes, rngs)
    weights.freeze(model, experiment.trainable)
    return model


def make_network(experiment, num_classes: int, rngs):
    """The experiment's whole network, with the public weights that it begins with, if any; raises as `make_model`."""
    from dpnb.models import weights

    build = find_network(experiment.network).build
    if isinstance(build, str):
        module, function = build.split(":")
        build = getattr(importlib.import_module(f"dpnb.models.{module}"), function)
    model = build(experiment, num_classes, rngs)
    if experiment.pretrained:
        weights.load_pretrained_params(model, weights.load(experiment.pretrained))
    return model


def fixed_features(experiment):
    """The module that makes the fixed features of the experiment's network; None if it reads images."""
    name = find_network(experiment.network).fixed
    return importlib.import_module(f"dpnb.models.{name}") if name else None


def feature_fields(experiment) -> dict[str, Any]:
    """The fields that decide about the network's features, its weights apart."""
    return {name: getattr(experiment, name) for name in find_network(experiment.network).identity}
