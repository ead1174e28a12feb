"""The mechanism of one update, the privacy budget, and how steps compose."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

NEIGHBOURS = "add or remove one training example"
SMALLEST_CLIP_NORM = 1e-12  # the squares of smaller gradients are zero in float32
LARGEST_CLIP_NORM = 1e18  # the squares of larger gradients are beyond float32
SAMPLERS = ("poisson", "shuffle")
DpEvent = Any  # of dp_accounting, which has no types and is imported late


class MissingAccountant(ImportError):
    """An epsilon was asked for, but dp-accounting is not installed."""


@dataclasses.dataclass(frozen=True)
class PrivacyBudget:
    """The promise (epsilon, delta). `epsilon=inf` promises nothing and never refuses a step.

    A finite epsilon is at most 1000: above that nothing is protected, and PLD runs out of memory.

    Raises:
      ValueError: epsilon or delta is out of range.

    >>> PrivacyBudget(8, 1e-5)
    PrivacyBudget(epsilon=8.0, delta=1e-05)
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", float(self.epsilon))
        object.__setattr__(self, "delta", float(self.delta))
        if not (0 < self.epsilon <= 1000 or self.epsilon == math.inf):
            raise ValueError(f"epsilon must be in (0, 1000], or inf for no budget, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}; 1/n or less is customary")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One update: the sum of the clipped gradients of a sampled batch, plus Gaussian noise.

    Args:
      noise_multiplier: sigma, the standard deviation of the noise over the sensitivity, in [0, 1e5]. A sigma below 0.1
        is accounted as no noise: it protects next to nothing and the accountants would take very long, so epsilon
        is infinite, which is always true.
      sampling_probability: q, the expected batch size over the number of training examples, in (0, 1].
      sampler: "poisson" means that every example enters independently with probability q, which is what the accountants
        assume. "shuffle" means fixed-size batches of a shuffled epoch, as in the paper's runs; they are accounted as if
        they were Poisson samples, so every epsilon is nominal and not a guarantee.
    Raises:
      ValueError: an argument is out of range.

    >>> Mechanism(1.0, 0.01, "shuffle").claim
    'nominal'
    """

    noise_multiplier: float
    sampling_probability: float
    sampler: str = "poisson"

    def __post_init__(self) -> None:
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
        """Whether the sampler that runs is the one that is accounted; otherwise every epsilon is nominal."""
        return self.sampler == "poisson"

    @property
    def has_noise(self) -> bool:
        """Whether there is enough noise to be accounted."""
        return self.noise_multiplier >= 0.1

    @property
    def claim(self) -> str:
        """The claim as records state it: "valid" or "nominal"."""
        return "valid" if self.is_exactly_accounted else "nominal"

    def event(self, steps: int = 1) -> DpEvent:
        """The dp_accounting DpEvent of `steps` updates.

        Raises:
          MissingAccountant: dp-accounting is not installed.

        >>> Mechanism(1.0, 0.01).event(10).count
        10
        """
        dp = dp_accounting_or_error()
        if not self.has_noise:
            one = dp.NonPrivateDpEvent()
        else:
            noise = dp.GaussianDpEvent(self.noise_multiplier)
            one = dp.PoissonSampledDpEvent(self.sampling_probability, noise)
        return dp.SelfComposedDpEvent(one, steps)


def compose(counts: Mapping[Mechanism, int]) -> DpEvent:
    """The DpEvent of all steps in `counts`, {mechanism: number of steps}. Their order makes no difference.

    Raises:
      MissingAccountant: dp-accounting is not installed.

    >>> len(compose({Mechanism(1.0, 0.01): 10, Mechanism(2.0, 0.01): 5}).events)
    2
    """
    return dp_accounting_or_error().ComposedDpEvent([m.event(n) for m, n in counts.items() if n])


def counts_from_json(events: Iterable[Mapping[str, Any]]) -> dict[Mechanism, int]:
    """The number of steps of each mechanism, in order of appearance.

    Args:
      events: from `Ledger.events()` or a result record.
    Raises:
      ValueError: an entry does not have exactly the fields of `Mechanism` and a positive `steps`.

    >>> counts_from_json([{"noise_multiplier": 1, "sampling_probability": 0.5, "sampler": "poisson", "steps": 3}])
    {Mechanism(noise_multiplier=1.0, sampling_probability=0.5, sampler='poisson'): 3}
    """
    counts: dict[Mechanism, int] = {}
    for entry in events:
        fields = dict(entry)
        steps = fields.pop("steps", None)
        names = {f.name for f in dataclasses.fields(Mechanism)}
        if set(fields) != names or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"an event has the fields {sorted(names)} and steps >= 1, got {dict(entry)}")
        mechanism = Mechanism(**fields)
        counts[mechanism] = counts.get(mechanism, 0) + steps
    return counts


def events_from_json(events: Iterable[Mapping[str, Any]]) -> DpEvent:
    """The composed DpEvent of `Ledger.events()` or of a result record, from which any epsilon can be recomputed.

    Raises:
      ValueError, MissingAccountant: as `counts_from_json` and `compose`.

    >>> entry = {"noise_multiplier": 1, "sampling_probability": 0.5, "sampler": "poisson", "steps": 3}
    >>> [event.count for event in events_from_json([entry]).events]
    [3]
    """
    return compose(counts_from_json(events))


def warn_if_delta_is_large(delta: float, n: int) -> None:
    """Warns if delta >= 1/n for `n` training examples.

    Whatever epsilon is, such a delta would allow publishing one training example, drawn at random, in full.

    >>> warn_if_delta_is_large(1e-5, 50_000)
    """
    if delta >= 1 / n:
        warnings.warn(
            f"delta should be well below 1/n = {1 / n:.2g} for {n} training examples, got {delta:g}: whatever "
            "epsilon is, it allows publishing one of them in full; set a smaller delta",
            stacklevel=2,
        )


def dp_accounting_or_error() -> Any:
    """The module dp_accounting.

    Raises:
      MissingAccountant: it cannot be imported.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise MissingAccountant(
            "computing an epsilon needs dp-accounting, which cannot be imported here; run: pip install "
            "dp-accounting. To train without it, compute the noise multiplier and the number of steps "
            "elsewhere and pass allowed_steps={mechanism: steps} to the Ledger"
        ) from error
    return dp_accounting
