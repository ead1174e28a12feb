"""What one private training run is: a frozen dataclass, one field per decision."""

import dataclasses
import hashlib
import json
import math
import re

from dpnb.models.registry import NETWORKS, find_network
from dpnb.privacy import ACCOUNTANTS, DEFAULT_ACCOUNTANT, SAMPLERS, SMALLEST_CLIP_NORM, Mechanism

FORMS = ("auto", "materialised", "two-pass")  # of the clipped gradient, see `dpnb.gradients.clipping`
SCHEDULES = ("constant", "cosine")
# Fields younger than the first records: at these values they leave an experiment what it was.
LATER = {"schedule": "constant", "pretrained": "", "trainable": "all", "image_size": 0}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One cell of a table, or anything else that can be trained with DP-SGD.

    Exactly one of (`noise_multiplier`, `steps`, `epsilon`) may be None: it is calibrated
    from the other two, without overshoot. Unknown field names raise TypeError.

    Attributes:
      name: unique, e.g. "cifar10/wrn-16-4/eps8".
      dataset: "cifar10", "cifar100", "digits", what a prepared array file holds, or with `image_size` any
        set of photographs, as for `dpnb.data.load`.
      network: "wrn", "scatter-linear" (a linear layer on fixed scattering features), "nf-resnet" or
        "nf-resnet-timm" (timm's padding and shortcuts, for its weights), "nfnet-f0", "-f1" or "-f3".
      depth, width: of the Wide-ResNet; of an NF-ResNet, its width being a multiple of the published one
        (0.25 is narrow); of an NFNet the width alone.
      image_size: 0 for small images in memory as they are; S for photographs that stay on disk and are
        read when they are drawn: squares resized to 1.2 S, views of S x S pixels (paper: 224).
      norm: "group" (16 groups) or "none".
      standardised: weight standardisation of all convolutions.
      relu_first: ReLU before the norm, as in the paper; False is the classic order.
      pretrained: public weights to begin with, a name or path as for `dpnb.models.weights.load`; the
        classifier begins anew.  "" for none.
      trainable: "all", "classifier" (the last layer, on features that are computed once), or "last-k":
        the last k residual blocks and what follows them.
      epsilon, delta: the budget, under add-or-remove-one; epsilon = inf for none.
      noise_multiplier: sigma, noise standard deviation / sensitivity.
      steps: number of updates.
      expected_batch_size: B; every example enters with probability q = B / N.
      augmult: K, augmented views per example; 0 is the plain image.
      clip_norm: C; the update is divided by C, so that learning_rate does not depend on it.
      learning_rate, momentum: of SGD; the paper uses no momentum.
      schedule: of the learning rate over the updates: "constant" (the paper), or "cosine" down to zero.
      ema_decay: upper limit of the averaging coefficient min(ema_decay, (1 + t) / (10 + t)).
      sampler: "poisson" (exact) or "shuffle" (as the paper ran; its epsilon is nominal).
      accountant: a name in `dpnb.privacy.ACCOUNTANTS`, used for calibration; results state the epsilons of all.
      validation: hold out this many training images and report on them, for tuning.
      compute_dtype: "float32" or "bfloat16"; clipping, sums and noise are float32 always.
      seed: of everything random. None draws a secret one, which no record shows.
      physical_batch_size: examples per device and call; None fits it to the memory.
      form: of the clipped-gradient core, see `dpnb.gradients.clipping`; "auto" decides by memory. The result
        is the same but for rounding.
      remat: recompute residual blocks in the backward pass (NF-ResNets, NFNets): less memory, more time.
      shard: divide parameters, averages, optimizer and noise over the devices, where a copy on each does
        not fit; the result is the same.
      eval_every: updates between points of the curve; 0 evaluates only at the end.
      eval_examples: evaluation images for the curve (the end always uses all of them).
      preset: the scale of the run (smoke, teach, colab, paper).
      data_note: caveat about the data, copied into the record.
      paper_mean, paper_std: test accuracy in percent in the paper, None where unknown.
      paper_source: where the number stands, and whether it is verified.
      impossible: why nobody outside can run it, and what takes its place; "" if anybody can.
    """

    name: str
    dataset: str = "cifar10"
    network: str = "wrn"
    depth: int = 16
    width: int = 4
    norm: str = "group"
    standardised: bool = True
    relu_first: bool = True
    pretrained: str = ""
    trainable: str = "all"
    image_size: int = 0
    epsilon: float | None = 8.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    steps: int | None = 1000
    expected_batch_size: int = 4096
    augmult: int = 16
    clip_norm: float = 1.0
    learning_rate: float = 2.0
    momentum: float = 0.0
    schedule: str = "constant"
    ema_decay: float = 0.9999
    sampler: str = "poisson"
    accountant: str = DEFAULT_ACCOUNTANT
    validation: int = 0
    compute_dtype: str = "float32"
    seed: int | None = 0
    physical_batch_size: int | None = None
    form: str = "auto"
    remat: bool = False
    shard: bool = False
    eval_every: int = 100
    eval_examples: int = 10_000
    preset: str = "paper"
    data_note: str = ""
    paper_mean: float | None = None
    paper_std: float | None = None
    paper_source: str = ""
    impossible: str = ""

    def __post_init__(self):
        object.__setattr__(self, "pretrained", str(self.pretrained))  # a path may come as one

        def check(ok, invariant, got):
            if not ok:
                raise ValueError(f"{self.name}: {invariant}, got {got!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, (int, float)) and value is not None and field.name != "seed":
                check(isinstance(value, (int, float)), f"{field.name} must be a number", value)
        free = [n for n in ("noise_multiplier", "steps", "epsilon") if getattr(self, n) is None]
        check(len(free) <= 1, "at most one of noise_multiplier, steps, epsilon may be None", free)
        check(
            self.epsilon is None or self.epsilon > 0, "epsilon must be positive (inf for none)", self.epsilon
        )
        check(0 < self.delta < 1, "delta must be in (0, 1)", self.delta)
        sigma = self.noise_multiplier
        check(sigma is None or 0 <= sigma < math.inf, "noise_multiplier must be finite and >= 0", sigma)
        check(self.steps is None or self.steps > 0, "steps must be positive", self.steps)
        check(self.expected_batch_size > 0, "expected_batch_size must be positive", self.expected_batch_size)
        check(self.augmult >= 0, "augmult must be >= 0", self.augmult)
        check(self.clip_norm > 0, "clip_norm must be positive", self.clip_norm)
        check(
            self.clip_norm >= SMALLEST_CLIP_NORM,
            f"clip_norm must be at least {SMALLEST_CLIP_NORM}",
            self.clip_norm,
        )
        check(0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)", self.ema_decay)
        rate = self.learning_rate
        check(math.isfinite(rate) and rate >= 0, "learning_rate must be finite and >= 0", rate)
        check(0 <= self.momentum < 1, "momentum must be in [0, 1)", self.momentum)
        check(self.network in NETWORKS, f"network must be one of {tuple(NETWORKS)}", self.network)
        check(self.norm in ("group", "none"), "norm must be group or none", self.norm)
        check(
            not self.on_features or self.augmult == 0,
            "fixed features are computed once, from the plain image (augmult 0)",
            self.augmult,
        )
        check(self.schedule in SCHEDULES, f"schedule must be one of {SCHEDULES}", self.schedule)
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
        check(
            not (self.pretrained and find_network(self.network).fixed),
            "fixed features do not begin pretrained",
            self.network,
        )
        check(self.width > 0, "width must be positive", self.width)
        check(self.image_size >= 0, "image_size must be 0 or the pixels of a side", self.image_size)
        check(self.form in FORMS, f"form must be one of {FORMS}", self.form)
        check(self.sampler in SAMPLERS, f"sampler must be one of {SAMPLERS}", self.sampler)
        check(
            self.accountant in ACCOUNTANTS, f"accountant must be one of {tuple(ACCOUNTANTS)}", self.accountant
        )
        check(
            self.compute_dtype in ("float32", "bfloat16"),
            "compute_dtype must be float32 or bfloat16",
            self.compute_dtype,
        )

    @property
    def on_features(self) -> bool:
        """What is trained reads features that are computed once (`dpnb.training.features`), not images."""
        return bool(find_network(self.network).fixed) or self.trainable == "classifier"

    def replace(self, **changes) -> "Experiment":
        """A copy with some fields changed; an unknown name raises TypeError."""
        return dataclasses.replace(self, **changes)

    def mechanism(self, n: int) -> Mechanism:
        """What one update does to privacy, with `n` training examples (noise_multiplier known)."""
        return Mechanism(self.noise_multiplier, self.expected_batch_size / n, self.sampler)

    def fingerprint(self, **more) -> str:
        """SHA-256 of everything here (and `more`) that determines the released parameters.

        Rounding apart: the physical batch size may differ where another machine goes on.
        """
        fields = {k: v for k, v in self.identity_fields().items() if k not in LATER or v != LATER[k]}
        text = json.dumps({**fields, **more}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity_fields(self) -> dict:
        """The fields that make it another experiment; the seed, and what is only shown, left out."""
        presentation = {"name", "preset", "data_note", "paper_mean", "paper_std", "paper_source"}
        presentation |= {
            "eval_every",
            "eval_examples",
            "seed",
            "physical_batch_size",
            "form",
            "remat",
            "shard",
            "impossible",
        }
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in presentation}
