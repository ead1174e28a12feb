"""What one update does to privacy, what was promised, and how steps compose."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

NEIGHBOURS = "add or remove one training example"
SMALLEST_CLIP_NORM = 1e-12  # the squares of smaller gradients are zero in float32
LARGEST_CLIP_NORM = 1e18  # the squares of larger gradients are beyond float32
SAMPLERS = ("poisson", "shuffle")


class MissingAccountant(ImportError):
    """dp-accounting is not installed here and a number was asked for."""


@dataclasses.dataclass(frozen=True)
class PrivacyBudget:
    """The promise (epsilon, delta). `epsilon=inf` promises nothing and never refuses a step.

    Finite epsilons end at 1000: beyond, nothing is protected and PLD runs out of memory.
    """

    epsilon: float
    delta: float

    def __post_init__(self):
        object.__setattr__(self, "epsilon", float(self.epsilon))
        object.__setattr__(self, "delta", float(self.delta))
        if not (0 < self.epsilon <= 1000 or self.epsilon == math.inf):
            raise ValueError(f"epsilon must be in (0, 1000], or inf for no budget, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}; 1/n or less is customary")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One update: the sum of clipped gradients of a sampled batch, plus Gaussian noise.

    noise_multiplier: sigma, standard deviation of the noise over the sensitivity, in [0, 1e5].
      Below 0.1 it is accounted as none: such noise protects next to nothing and takes the
      accountants very long, so epsilon is infinite, which is always true.
    sampling_probability: q = expected batch size / number of training examples, in (0, 1].
    sampler: "poisson": every example enters independently with probability q; what is accounted.
      "shuffle": fixed-size batches of a shuffled epoch, as the paper ran. Accounted as if it were
      Poisson, so every epsilon is nominal: not a guarantee.
    """

    noise_multiplier: float
    sampling_probability: float
    sampler: str = "poisson"

    def __post_init__(self):
        for name in ("noise_multiplier", "sampling_probability"):  # float32 scalars would not survive JSON
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 <= self.noise_multiplier <= 1e5:
            raise ValueError(
                f"noise_multiplier must be in [0, 1e5], got {self.noise_multiplier}; "
                "more noise is lost in rounding"
            )
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(
                f"sampling_probability must be in (0, 1], got {self.sampling_probability}; "
                "it is the expected batch size over the number of training examples"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f'sampler must be "poisson" or "shuffle", got {self.sampler!r}')

    @property
    def is_exactly_accounted(self) -> bool:
        """Whether what runs is what is accounted. False: every epsilon is nominal."""
        return self.sampler == "poisson"

    @property
    def has_noise(self) -> bool:
        """Whether the noise is enough to be accounted."""
        return self.noise_multiplier >= 0.1

    @property
    def claim(self) -> str:
        """ "valid" or "nominal", as records say it."""
        return "valid" if self.is_exactly_accounted else "nominal"

    def event(self, steps: int = 1):
        """The dp_accounting DpEvent of `steps` updates."""
        dp = dp_accounting_or_error()
        if not self.has_noise:
            one = dp.NonPrivateDpEvent()
        else:
            noise = dp.GaussianDpEvent(self.noise_multiplier)
            one = dp.PoissonSampledDpEvent(self.sampling_probability, noise)
        return dp.SelfComposedDpEvent(one, steps)


def compose(counts: Mapping[Mechanism, int]):
    """The DpEvent of so many steps of each mechanism; composition does not depend on their order."""
    return dp_accounting_or_error().ComposedDpEvent([m.event(n) for m, n in counts.items() if n])


def counts_from_json(events: Iterable[Mapping[str, Any]]) -> dict[Mechanism, int]:
    """Steps of each mechanism, in order of appearance, from `Ledger.events()` or a result record.

    Raises:
      ValueError: an entry without exactly the fields of `Mechanism` and a positive `steps`.
    """
    counts = {}
    for entry in events:
        fields = dict(entry)
        steps = fields.pop("steps", None)
        names = {f.name for f in dataclasses.fields(Mechanism)}
        if set(fields) != names or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"an event has the fields {sorted(names)} and steps >= 1, got {dict(entry)}")
        mechanism = Mechanism(**fields)
        counts[mechanism] = counts.get(mechanism, 0) + steps
    return counts


def events_from_json(events: Iterable[Mapping[str, Any]]):
    """The composed DpEvent of `Ledger.events()` or a result record: recompute any epsilon from it."""
    return compose(counts_from_json(events))


def warn_if_delta_is_large(delta: float, n: int) -> None:
    """Warns if delta >= 1/n for `n` training examples.

    Such a delta allows publishing one training example drawn at random, in full, whatever epsilon is.
    """
    if delta >= 1 / n:
        warnings.warn(
            f"delta should be well below 1/n = {1 / n:.2g} for {n} training examples, got {delta:g}: whatever "
            "epsilon is, it allows publishing one of them in full; set a smaller delta",
            stacklevel=2,
        )


def dp_accounting_or_error():
    try:
        import dp_accounting
    except ImportError as error:
        raise MissingAccountant(
            "computing an epsilon needs dp-accounting, which cannot be imported here; run: pip install "
            "dp-accounting. To train without it, compute the noise multiplier and the number of steps "
            "elsewhere and pass allowed_steps={mechanism: steps} to the Ledger"
        ) from error
    return dp_accounting
