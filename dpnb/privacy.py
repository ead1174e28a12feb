"""The accountant: epsilon of a mechanism, and calibration that never overshoots.

All accounting is dp-accounting's, imported only where a number is computed, so that a machine
without it can train. What was really executed, and the statement about it, is `dpnb.ledger`,
whose names can be had from here too.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

NEIGHBOURS = "add or remove one training example"
PLD_INTERVAL = 1e-4  # discretisation of the privacy loss, as the paper's code has it since v0.2
PLD_ROUNDING = 2.0**-50  # a step's share in delta, see `_pld_rounding`
RDP_ROUNDING = 2.0**-48  # a step's share in the exponent (order - 1) x divergence, over the order
ACCOUNTANTS = ("pld", "rdp")
SMALLEST_CLIP_NORM = 1e-12  # the squares of smaller gradients are zero in float32
LARGEST_CLIP_NORM = 1e18  # the squares of larger gradients are beyond float32
SAMPLERS = ("poisson", "shuffle")
MOST_STEPS = 10_000_000  # where a search for the number of steps ends


class MissingAccountant(ImportError):
    """dp-accounting is not installed here and a number was asked for."""


class DeltaTooSmall(ValueError):
    """PLD's rounding errors are as large as this delta, so that it can prove no epsilon there. RDP can."""


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
    def valid(self) -> bool:
        """Whether what runs is what is accounted. False: every epsilon is nominal."""
        return self.sampler == "poisson"

    @property
    def private(self) -> bool:
        """Whether the noise is enough to be accounted."""
        return self.noise_multiplier >= 0.1

    @property
    def claim(self) -> str:
        """ "valid" or "nominal", as records say it."""
        return "valid" if self.valid else "nominal"

    def event(self, steps: int = 1):
        """The dp_accounting DpEvent of `steps` updates."""
        dp = _dp_accounting()
        if not self.private:
            one = dp.NonPrivateDpEvent()
        else:
            noise = dp.GaussianDpEvent(self.noise_multiplier)
            one = dp.PoissonSampledDpEvent(self.sampling_probability, noise)
        return dp.SelfComposedDpEvent(one, steps)


def compose(counts: Mapping[Mechanism, int]):
    """The DpEvent of so many steps of each mechanism; composition does not depend on their order."""
    return _dp_accounting().ComposedDpEvent([m.event(n) for m, n in counts.items() if n])


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


def epsilon(mechanism, steps: int, delta: float, accountant: str = "pld") -> float:
    """Smallest epsilon that the accountant proves for `steps` times `mechanism`: an upper bound on the true
    one, whatever its rounding errors.

    Args:
      mechanism: `Mechanism`, or any DpEvent.
      steps: how often it is run; 0 costs nothing.
      delta: in (0, 1). PLD needs one above its rounding errors: 3e-14 for one step, 2e-11 for 10,000.
      accountant: "pld", privacy loss distributions, an upper bound on a grid of `PLD_INTERVAL`, the
        tighter one; or "rdp" with the Renyi orders of the paper's code (v0.1.1), whose numbers it
        prints. Neighbouring relation: add or remove one example. Where PLD would take minutes and
        gigabytes (see `_costly`), RDP's number, an upper bound too, is the answer for "pld".
    Raises:
      MissingAccountant: dp-accounting is not installed.
      DeltaTooSmall: PLD can prove nothing at this delta; the message has the smallest it can do.

    >>> round(epsilon(Mechanism(10.0, 4096 / 50_000), 875, 1e-5, accountant="rdp"), 4)
    0.9877
    """
    dp = _dp_accounting()
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if operator.index(steps) < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if steps == 0:
        return 0.0
    event = mechanism.event() if isinstance(mechanism, Mechanism) else mechanism
    # (composing `steps` times and composing an event of `steps` give the same number, to the bit)
    runs = list(_runs(dp, event, int(steps)))
    with _quiet():
        bound = _rdp_epsilon(dp, runs, delta)
        return bound if accountant == "rdp" or _costly(runs, bound) else _pld_epsilon(dp, runs, delta)


def _runs(dp, event, times: int) -> Iterator[tuple[Any, int]]:
    """The steps in so many times an event, as (event of one step, how many of it)."""
    if isinstance(event, dp.SelfComposedDpEvent):
        yield from _runs(dp, event.event, times * event.count)
    elif isinstance(event, dp.ComposedDpEvent):
        for part in event.events:
            yield from _runs(dp, part, times)
    else:
        yield event, times


def _composed(account, runs):
    for event, steps in runs:
        account.compose(event, steps)
    return account


def _rdp_epsilon(dp, runs, delta: float) -> float:
    """RDP's, with divergences rounded up: rounded down to nothing, they would prove an epsilon of 0."""
    import numpy as np
    from dp_accounting import rdp

    account = _composed(rdp.RdpAccountant(_rdp_orders(), dp.NeighboringRelation.ADD_OR_REMOVE_ONE), runs)
    rounding = RDP_ROUNDING * sum(steps for _, steps in runs) * account.orders / (account.orders - 1)
    return float(rdp.compute_epsilon(account.orders, np.maximum(account.rdp, 0) + rounding, delta)[0])


def _costly(runs, bound: float) -> bool:
    """Whether PLD would take more than some seconds and about a gigabyte, for an epsilon up to `bound`.

    Its grid of one step is the wider the less noise there is, that of all the wider the larger epsilon is,
    and at many steps it is cut no narrower than sqrt(epsilon x steps).
    """
    noise = [getattr(getattr(event, "event", event), "noise_multiplier", 1.0) for event, _ in runs]
    return bound > 1000 or bound * sum(steps for _, steps in runs) > 1e8 or min(noise, default=1.0) < 0.15


def _pld_epsilon(dp, runs, delta: float) -> float:
    """PLD's, at a delta less its rounding errors."""
    from dp_accounting.pld import PLDAccountant

    steps = sum(n for _, n in runs)
    rounding = _pld_rounding(steps, len(runs))
    if delta < 2 * rounding:
        raise DeltaTooSmall(
            f"delta must be at least {2 * rounding:.2g} under PLD, whose rounding errors in {steps} steps are "
            f'about as large as that, got {delta}; ask for a larger delta, or with accountant "rdp"'
        )
    account = _composed(PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, PLD_INTERVAL), runs)
    # (the losses that it looks epsilon up among are a running sum of the interval)
    return float(account.get_epsilon(delta - rounding)) * (1 + 1e-8)


def _pld_rounding(steps: int, runs: int) -> float:
    """A bound, to first order, on what PLD's delta can be too small by.

    A distribution composed n times is the n-th power of its Fourier transform, whose phases are then wrong
    by up to 2.6 n units in the last place (2^-52), and a sum of its tail by up to about 4 n. (The largest
    that was found in 200 settings against tilted transforms, which have no such error, is 0.7 n.) Each
    run adds what does not grow with n, up to 13 such units; and 2e-15 that is cut off as infinite loss.
    """
    return PLD_ROUNDING * (steps + 16 * runs)


def epsilon_curve(mechanism, steps: Sequence[int], delta: float, accountant: str = "pld") -> list[float]:
    """Epsilon after each of `steps` updates, for a plot of how the budget is spent; raises as `epsilon`."""
    return [_cached_epsilon(mechanism, int(n), delta, accountant) for n in steps]


@functools.lru_cache(maxsize=1024)
def _cached_epsilon(mechanism: Mechanism, steps: int, delta: float, accountant: str) -> float:
    """A notebook plots the curve that training shows again; PLD takes a second a point."""
    return epsilon(mechanism, steps, delta, accountant)


@functools.lru_cache(maxsize=256)
def calibrate_noise(
    budget: PrivacyBudget, sampling_probability: float, steps: int, accountant: str = "pld"
) -> float:
    """Smallest noise multiplier (to 1e-5 relative) with which `steps` updates stay in the budget.

    Never overshoots: epsilon is at most `budget.epsilon` less a millionth, so that another machine
    whose last digits differ agrees. 0 for an infinite budget.

    Raises:
      ValueError: no noise up to 1e5 is enough (RDP's orders cannot prove an epsilon much below 0.01).
      DeltaTooSmall: no noise is enough for PLD to prove anything at this delta; RDP can.
    """
    if operator.index(steps) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if budget.epsilon == math.inf:
        return 0.0
    target = budget.epsilon * (1 - 1e-6)

    def solve(kind: str, guess: float):  # in x = 1/sigma, along which epsilon grows
        def spent(x):
            return epsilon(Mechanism(1 / x, sampling_probability), steps, budget.delta, kind)

        return _last_that_fits(spent, target, guess, least=1e-5, most=10.0)

    x = solve("rdp", 1.0)  # cheap, and a good first guess for PLD
    x = x if accountant == "rdp" else solve(accountant, x or 1.0)
    if x is None:
        raise ValueError(
            f"no noise multiplier up to 1e5 keeps {steps} steps within epsilon {budget.epsilon} at delta "
            f"{budget.delta} under {accountant}; ask for a larger epsilon or delta, or for PLD"
        )
    return 1 / x


def affordable_steps(
    budget: PrivacyBudget,
    mechanism: Mechanism,
    accountant: str = "pld",
    spent: Mapping[Mechanism, int] | None = None,
) -> int:
    """Largest n such that n steps of `mechanism`, beside those of the others in `spent`, fit.

    May be 0. The search ends at `MOST_STEPS`, which an infinite budget gives at once, and under PLD where
    more steps would have rounding errors as large as delta.

    Raises:
      DeltaTooSmall: so would one step. RDP can prove an epsilon there.
    """
    if budget.epsilon == math.inf:
        return MOST_STEPS
    counts = dict(spent or {})

    def solve(kind: str, guess: int):
        def total(n):
            counts[mechanism] = int(n)
            try:
                return epsilon(compose(counts), 1, budget.delta, kind)
            except DeltaTooSmall:
                if n == 1:
                    raise
                return math.inf

        return _last_that_fits(total, budget.epsilon, guess, least=1, most=MOST_STEPS, whole=True)

    n = solve("rdp", 1)  # cheap, and a good first guess for PLD
    n = n if accountant == "rdp" else solve(accountant, n or 1)
    return int(n or 0)


def calibrate_steps(
    budget: PrivacyBudget, sampling_probability: float, noise_multiplier: float, accountant: str = "pld"
) -> int:
    """Largest number of updates whose epsilon is at most the budget's: rounded down, and checked.

    (The paper's code rounds up and overspends by a step or two.)

    Raises:
      ValueError: not even one step fits, or `MOST_STEPS` and more do.
      DeltaTooSmall: as `affordable_steps`.
    """
    mechanism = Mechanism(noise_multiplier, sampling_probability)
    steps = affordable_steps(budget, mechanism, accountant)
    if steps < 1:
        raise ValueError(f"not one step of {mechanism} fits within {budget} under {accountant}; add noise")
    if steps >= MOST_STEPS:
        raise ValueError(f"{MOST_STEPS} and more steps of {mechanism} fit within {budget}; choose a number")
    return steps


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


def __getattr__(name: str):
    # On demand, as these modules import this one.
    if name == "privacy_statement":
        from dpnb import statement

        return statement.privacy_statement
    if name in ("Ledger", "LedgerError", "LedgerLocked", "BudgetExceeded", "derived_seed"):
        from dpnb import ledger

        return getattr(ledger, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _last_that_fits(
    value_at: Callable[[float], float],
    target: float,
    guess: float,
    *,
    least: float,
    most: float,
    whole: bool = False,
) -> float | None:
    """Largest x in [least, most], to 1e-5 relative (or whole), with value_at(x) <= target; None if none.

    `value_at` grows. Brackets outwards from `guess`, then false position (Illinois) on log scales.
    Every x that is returned was itself evaluated and fits; x + 1 (or x * 1.00001) was and does not.
    """

    def gap(x):
        value = value_at(x)
        return -math.inf if value <= 0 else math.log(value / target)  # exactly 0 only where equal

    low = high = None  # low fits, high does not
    x, factor = min(max(guess, least), most), 1.1
    while low is None or high is None:
        at = gap(x)
        if at <= 0:
            if x == most:
                return x
            low, at_low = x, at
            x = min(max(x * factor, x + 1) if whole else x * factor, most)
        else:
            if x == least:
                return None
            high, at_high = x, at
            x = max(x / factor, least)
        x = float(round(x)) if whole else x
        factor *= factor
    side = 0
    while high - low > 1 if whole else high > low * (1 + 1e-5):
        share = at_low / (at_low - at_high)
        share = share if math.isfinite(at_low) and math.isfinite(at_high) else 0.5
        x = low * (high / low) ** share
        if whole:
            x = min(max(float(round(x)), low + 1), high - 1)
        else:  # never a step too small to end on
            x = min(max(x, low * (1 + 5e-6)), high / (1 + 5e-6))
        at = gap(x)
        if at <= 0:
            low, at_low, at_high = x, at, at_high / 2 if side < 0 else at_high
            side = -1
        else:
            high, at_high, at_low = x, at, at_low / 2 if side > 0 else at_low
            side = 1
    return low


def _rdp_orders() -> list[float]:
    """The orders of the paper's code, v0.1.1."""
    import numpy as np

    return [*np.linspace(1.01, 8, 50), *range(8, 64), *np.linspace(65, 512, 10).astype(int)]


def _dp_accounting():
    try:
        import dp_accounting
    except ImportError as error:
        raise MissingAccountant(
            "computing an epsilon needs dp-accounting, which cannot be imported here; run: pip install "
            "dp-accounting. To train without it, compute the noise multiplier and the number of steps "
            "elsewhere and pass allowed_steps={mechanism: steps} to the Ledger"
        ) from error
    return dp_accounting


@contextlib.contextmanager
def _quiet():
    """Without a warning for every Renyi order that did not converge: leaving one out is safe."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
