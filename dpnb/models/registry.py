"""The table of networks: a new network needs its module and one line here.

An experiment names its network; whatever differs between networks is a column of this table, and no other
code compares names. Modules are imported when their network is built, so reading the table needs no JAX.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

_WIDE = ("depth", "width", "norm", "standardised", "relu_first", "compute_dtype")
_FREE = ("network", "depth", "width", "compute_dtype")


@dataclasses.dataclass(frozen=True)
class Network:
    """One line of the table; `experiment` is any object with the fields of `dpnb.experiments.Experiment`.

    build: (experiment, num_classes, rngs) -> nnx.Module of images float [batch, h, w, 3] -> logits; or the
      name of such a function, "MODULE:FUNCTION" in `dpnb.models`. For `trainable="classifier"` the module has
      a method `features(images)`, which returns the inputs of its last layer, and for `trainable="last-k"` a
      list `blocks`; its last layer is the attribute `linear`.
    label: its name in tables; {depth} and other fields are filled in, and {scaled} adds the width and the
      image size of a network that is not as wide as the published one.
    feature_size: how many numbers the classifier reads from one image, at width 1.
    kind, identity: what it is called, and the fields that affect its features, apart from the weights. Both
      are hashed into the fingerprints of features: they never change in a line that has records.
    feature_batch: images per call when features are computed.
    fixed: the module in `dpnb.models` that makes the fixed features which it reads instead of images, with
      `WORDS` (hashed, like `kind`) and `make_transform(side)`; "" if it reads images.
    depths: the depths that it is built in, () if it has one only.
    narrowest, whole: the smallest width, and whether widths are whole numbers.
    """

    build: str | Callable[[Any, int, Any], Any]
    label: str
    feature_size: int = 0
    kind: str = ""
    identity: tuple[str, ...] = ()
    feature_batch: int = 500
    fixed: str = ""
    depths: Sequence[int] = ()
    narrowest: float = 0.0
    whole: bool = False


def _free(build: str, label: str, size: int, narrowest: float, depths=()) -> Network:
    name = "normaliser-free network"
    return Network(
        build, label + "{scaled}", size, name, _FREE, feature_batch=32, depths=depths, narrowest=narrowest
    )


def _nf_resnet(build: str, label: str) -> Network:
    return _free(build, label, 2048, 1 / 64, (14, 26, 50, 101, 152, 200))


NETWORKS = {
    "wrn": Network(
        "wide_resnet:build", "WRN-{depth}-{width}", 64, "Wide-ResNet", _WIDE, depths=range(10, 1001, 6), narrowest=1,
        whole=True,
    ),
    "scatter-linear": Network("scattering:build", "scatter-linear", fixed="scattering"),
    "patch-linear": Network("patches:build", "patch-linear", 1024, "network of patches", ("width",), feature_batch=10),
    "nf-resnet": _nf_resnet("nf_resnet:build", "NF-ResNet-{depth}"),
    "nf-resnet-timm": _nf_resnet("nf_resnet:build_as_timm", "NF-ResNet-timm-{depth}"),
    "nfnet-f0": _free("nfnet:build", "NFNet-F0", 3072, 1 / 16),
    "nfnet-f1": _free("nfnet:build", "NFNet-F1", 3072, 1 / 16),
    "nfnet-f3": _free("nfnet:build", "NFNet-F3", 3072, 1 / 16),
}  # fmt: skip


def find_network(name: str) -> Network:
    """Returns the line of that name.

    Raises:
      ValueError: there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {tuple(NETWORKS)}, got {name!r}")
    return NETWORKS[name]


def label(experiment) -> str:
    """Returns the network's name in tables, such as "WRN-16-4" or "NF-ResNet-14 (width 0.25, 64 px)"."""
    e = experiment
    scaled = f" (width {e.width:g}, {e.image_size or 32} px)" if e.width != 1 else ""
    return find_network(e.network).label.format(**vars(e), scaled=scaled)


def feature_size(experiment) -> int:
    """Returns how many numbers the classifier reads from one image."""
    return int(find_network(experiment.network).feature_size * experiment.width)


def make_model(experiment, num_classes: int, rngs):
    """Builds what the experiment trains, an nnx.Module: its network, or the last layer alone, on features.

    Args:
      rngs: nnx.Rngs, for initial parameters.
    Raises:
      KeyError, ValueError, OSError: the public weights are not available, or are another network's.
    """
    from dpnb.models import weights
    from dpnb.models.scattering import ScatterLinear

    if experiment.trainable == "classifier":
        return ScatterLinear(num_classes, (feature_size(experiment),))
    model = make_network(experiment, num_classes, rngs)
    weights.freeze(model, experiment.trainable)
    return model


def make_network(experiment, num_classes: int, rngs):
    """Builds the experiment's whole network, with its public weights, if any; raises as `make_model` does."""
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
    """Returns the module that makes the fixed features of the network; None if it reads images."""
    name = find_network(experiment.network).fixed
    return importlib.import_module(f"dpnb.models.{name}") if name else None


def feature_fields(experiment) -> dict[str, Any]:
    """Returns the fields that affect the network's features, apart from its weights: {name: value}."""
    return {name: getattr(experiment, name) for name in find_network(experiment.network).identity}
