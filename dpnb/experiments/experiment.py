"""What one private training run is: a frozen dataclass, one field per decision."""

import dataclasses
import hashlib
import json
import math
import re
import textwrap
from collections.abc import Container
from typing import Any

from dpnb.experiments.values import INT32, Range, canonical
from dpnb.models import NETWORKS
from dpnb.models.registry import find_network
from dpnb.privacy import ACCOUNTANTS, DEFAULT_ACCOUNTANT, SAMPLERS, Mechanism
from dpnb.privacy.mechanism import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM

PRESETS = ("smoke", "teach", "colab", "paper")
FORMS = ("auto", "materialised", "two-pass")  # of the clipped gradient, see `dpnb.gradients.clipping`
# see `dpnb.gradients.convolution`
FORMULATIONS = ("auto", "unrolled", "unrolled_im2col", "sliced", "im2col", "grouped", "grouped_im2col")
SCHEDULES = ("constant", "cosine")
DTYPES = ("float32", "bfloat16", "float16")  # in which a network computes


@dataclasses.dataclass(frozen=True)
class Group:
    """What the fields of a group decide; those of an `identity` group make an experiment another one."""

    about: str
    identity: bool


GROUPS = {
    "model": Group("the network, and what it begins with", True),
    "privacy": Group("the mechanism and its budget", True),
    "learning": Group("images, views and optimizer", True),
    "performance": Group("how it is computed: the result is the same but for rounding", False),
    "paper": Group("what the paper reports", False),
    "run": Group("which run of the experiment, and what is shown of it", False),
}


def _field(
    group: str,
    about: str,
    default: Any = dataclasses.MISSING,
    *,
    allowed: Container | None = None,
    since: int = 0,
) -> Any:
    """A field of `Experiment`; its annotation says of which type its values are, see `values.canonical`.

    Args:
      group: one of `GROUPS`, which decides whether it is part of the experiment's identity.
      about: what it is, for documentation and the help of `dpnb run --set`.
      allowed: a `Range` of numbers, or the texts that there are; None for any.
      since: 0 for the fields of the first records. Every field that is added afterwards takes the next number;
        at its default it leaves all fingerprints as they were.
    """
    metadata = dict(group=group, about=about, allowed=allowed, since=since)
    return dataclasses.field(default=default, metadata=metadata)


COUNT, COUNT_OR_0 = Range(1, INT32), Range(0, INT32)
PERCENT = Range(0, 100)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One cell of a table, or anything else that can be trained with DP-SGD.

    Exactly one of (`noise_multiplier`, `steps`, `epsilon`) may be None: it is calibrated
    from the other two, without overshoot. Unknown field names raise TypeError.
    """

    # Names of fields never change: records are matched by them.
    name: str = _field("run", 'unique, e.g. "cifar10/wrn-16-4/eps8"')
    dataset: str = _field(
        "learning",
        '"cifar10", "cifar100", "digits", what an array file holds, or with image_size any set of photographs',
        "cifar10",
    )
    network: str = _field("model", "a name in `dpnb.models.NETWORKS`", "wrn", allowed=NETWORKS)
    depth: int = _field("model", "of a Wide-ResNet or NF-ResNet", 16, allowed=Range(0, 1000))
    width: int | float = _field(
        "model",
        "of a Wide-ResNet; else a multiple of the published one (0.25 is narrow)",
        4,
        allowed=Range(0, 1000, "(]"),
    )
    norm: str = _field("model", '"group" (16 groups) or "none"', "group", allowed=("group", "none"))
    standardised: bool = _field("model", "weight standardisation of all convolutions", True)
    relu_first: bool = _field(
        "model", "ReLU before the norm, as in the paper; False is the classic order", True
    )
    pretrained: str = _field(
        "model",
        'public weights to begin with, a name or path as for `dpnb.models.weights.load`, "" for none; the classifier '
        "begins anew",
        "",
        since=2,
    )
    trainable: str = _field(
        "model",
        '"all", "classifier" (the last layer, on features that are computed once), or "last-k": the last k residual '
        "blocks and what follows them",
        "all",
        since=2,
    )
    image_size: int = _field(
        "model",
        "0 for small images in memory as they are; S for photographs on disk: squares resized to 1.2 S, views of "
        "S x S pixels (paper: 224)",
        0,
        allowed=Range(0, 4096),
        since=3,
    )
    epsilon: float | None = _field(
        "privacy",
        "of the budget, under add-or-remove-one; inf for none",
        8.0,
        allowed=Range(0, 1000, "(]", infinite=True),
    )
    delta: float = _field(
        "privacy",
        "of the budget; well below one in the number of training images",
        1e-5,
        allowed=Range(0, 1, "()"),
    )
    noise_multiplier: float | None = _field(
        "privacy", "sigma, noise standard deviation / sensitivity", None, allowed=Range(0, 1e5)
    )
    steps: int | None = _field("privacy", "T, number of updates", 1000, allowed=COUNT)
    expected_batch_size: int = _field(
        "privacy", "B; every example enters with probability q = B / N", 4096, allowed=COUNT
    )
    augmult: int = _field(
        "learning", "K, augmented views per example; 0 is the plain image", 16, allowed=Range(0, 10_000)
    )
    clip_norm: float = _field(
        "privacy",
        "C; the update is divided by C, so that learning_rate does not depend on it",
        1.0,
        allowed=Range(SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM, infinite=True),
    )
    learning_rate: float = _field("learning", "of SGD", 2.0, allowed=Range(0, 1e38))
    momentum: float = _field("learning", "of SGD; the paper uses none", 0.0, allowed=Range(0, 1, "[)"))
    schedule: str = _field(
        "learning",
        'of the learning rate: "constant" (the paper), or "cosine" down to zero',
        "constant",
        allowed=SCHEDULES,
        since=1,
    )
    ema_decay: float = _field(
        "learning",
        "upper limit of the averaging coefficient min(ema_decay, (1 + t) / (10 + t))",
        0.9999,
        allowed=Range(0, 1, "[)"),
    )
    sampler: str = _field(
        "privacy",
        '"poisson" (exact) or "shuffle" (as the paper ran; epsilon is nominal)',
        "poisson",
        allowed=SAMPLERS,
    )
    accountant: str = _field(
        "privacy",
        "used for calibration, a name in `dpnb.privacy.ACCOUNTANTS`; results state the epsilons of all",
        DEFAULT_ACCOUNTANT,
        allowed=ACCOUNTANTS,
    )
    validation: int = _field(
        "learning", "training images to hold out and report on, for tuning", 0, allowed=COUNT_OR_0
    )
    compute_dtype: str = _field(
        "model",
        '"float32", "bfloat16", "float16", or "auto": half precision as the device has it (presets colab and paper), '
        "float32 on CPUs; clipping, sums and noise are never in half precision",
        "float32",
        allowed=("auto", *DTYPES),
    )
    seed: int | None = _field(
        "run",
        "of everything random; None draws a secret one, which no record shows",
        0,
        allowed=Range(0, math.inf, "[)"),
    )
    physical_batch_size: int | None = _field(
        "performance", "examples per device and call; None fits the memory", None, allowed=COUNT
    )
    form: str = _field(
        "performance",
        "of the clipped gradient, see `dpnb.gradients.clipping`; auto: by memory",
        "auto",
        allowed=FORMS,
    )
    formulation: str = _field(
        "performance",
        "of the weight gradients of convolutions, see `dpnb.gradients.convolution`; auto: by device",
        "auto",
        allowed=FORMULATIONS,
        since=4,
    )
    remat: bool = _field(
        "performance", "recompute residual blocks in the backward pass: less memory, more time", False
    )
    shard: bool = _field(
        "performance", "divide parameters, averages, optimizer and noise over the devices", False
    )
    eval_every: int = _field(
        "run", "updates between points of the curve; 0 evaluates only at the end", 100, allowed=COUNT_OR_0
    )
    eval_examples: int = _field(
        "run", "evaluation images for the curve (the end always uses all of them)", 10_000, allowed=COUNT
    )
    preset: str = _field("run", "the scale of the run (smoke, teach, colab, paper)", "paper", allowed=PRESETS)
    data_note: str = _field("run", "caveat about the data, copied into the record", "")
    paper_mean: float | None = _field(
        "paper", "test accuracy in percent, None if unknown", None, allowed=PERCENT
    )
    paper_std: float | None = _field(
        "paper", "its standard deviation over runs, None if unknown", None, allowed=PERCENT
    )
    paper_source: str = _field("paper", "where the number stands, and whether it is verified", "")
    impossible: str = _field(
        "paper", 'why nobody outside can run it, and what takes its place; "" if anybody can', ""
    )

    def __post_init__(self):
        def check(ok, invariant, got):
            if not ok:
                raise ValueError(f"{self.name}: {invariant}, got {got!r}")

        for f in dataclasses.fields(self):
            try:
                value = canonical(getattr(self, f.name), f.type, f.metadata["allowed"])
            except ValueError as error:
                raise ValueError(f"{self.name}: {f.name} {error}") from None
            object.__setattr__(self, f.name, value)
        free = [n for n in ("noise_multiplier", "steps", "epsilon") if getattr(self, n) is None]
        check(len(free) <= 1, "at most one of noise_multiplier, steps, epsilon may be None", free)
        network = find_network(self.network)
        known = ", ".join(map(str, network.depths[:6])) + " ..." * (len(network.depths) > 6)
        check(
            not network.depths or self.depth in network.depths,
            f"depth of {self.network} must be one of {known}",
            self.depth,
        )
        check(
            self.width >= network.narrowest,
            f"width of {self.network} must be at least {network.narrowest}",
            self.width,
        )
        check(
            isinstance(self.width, int) or not network.whole,
            f"width of {self.network} must be a whole number",
            self.width,
        )
        check(
            not self.on_features or self.augmult == 0,
            "fixed features are computed once, from the plain image (augmult 0)",
            self.augmult,
        )
        check(
            not self.on_features or self.compute_dtype != "auto",
            "fixed features are of one dtype on every device",
            self.compute_dtype,
        )
        check(
            self.trainable in ("all", "classifier") or re.fullmatch(r"last-[1-9]\d*", self.trainable),
            "trainable must be all, classifier, or last-k (last-1, last-2 ...)",
            self.trainable,
        )
        check(
            self.trainable == "all" or self.pretrained,
            "layers that are not trained need pretrained weights (a name or a path)",
            self.pretrained,
        )
        check(not (self.pretrained and network.fixed), "fixed features do not begin pretrained", self.network)

    @property
    def on_features(self) -> bool:
        """What is trained reads features that are computed once (`dpnb.training.features`), not images."""
        return bool(find_network(self.network).fixed) or self.trainable == "classifier"

    def replace(self, **changes) -> "Experiment":
        """A copy with some fields changed; an unknown name raises TypeError."""
        return dataclasses.replace(self, **changes)

    def on(self, dataset: str) -> "Experiment":
        """The same on another data set, beside which stands no number of the paper."""
        if dataset == self.dataset:
            return self
        source = f"none: {self.name} is on {self.dataset}"
        return self.replace(dataset=dataset, paper_mean=None, paper_std=None, paper_source=source)

    def mechanism(self, n: int) -> Mechanism:
        """What one update does to privacy, with `n` training examples (noise_multiplier known)."""
        return Mechanism(self.noise_multiplier, self.expected_batch_size / n, self.sampler)

    def fingerprint(self, **more) -> str:
        """SHA-256 of everything here (and `more`) that determines the released parameters.

        It does not tell rounding: the physical batch size may differ if another machine goes on. A field that was
        added after the first records counts once it is not at its default.
        """
        later = {f.name: f.default for f in dataclasses.fields(self) if f.metadata["since"]}
        fields = {k: v for k, v in self.identity_fields().items() if k not in later or v != later[k]}
        text = json.dumps({**fields, **more}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity_fields(self) -> dict[str, Any]:
        """The fields that make it another experiment: those of the `GROUPS` that say so."""
        identity = {f.name for f in dataclasses.fields(self) if GROUPS[f.metadata["group"]].identity}
        return {k: v for k, v in dataclasses.asdict(self).items() if k in identity}


def field_names(group: str) -> tuple[str, ...]:
    """The fields of one of `GROUPS`, in order.

    >>> field_names("performance")
    ('physical_batch_size', 'form', 'formulation', 'remat', 'shard')
    """
    return tuple(f.name for f in dataclasses.fields(Experiment) if f.metadata["group"] == group)


def describe_fields() -> str:
    """All fields, their defaults and what they are, group by group."""
    lines = []
    for name, group in GROUPS.items():
        lines.append(f"{name}: {group.about}")
        for f in dataclasses.fields(Experiment):
            if f.metadata["group"] == name:
                default = "" if f.default is dataclasses.MISSING else f" = {f.default!r}"
                lines.append(f"  {f.name}{default}: {f.metadata['about']}")
    return "\n".join(lines)


Experiment.__doc__ += "\n    Fields, by group:\n\n" + textwrap.indent(describe_fields(), "    ") + "\n"
