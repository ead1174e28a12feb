"""Calibration that never overshoots: the least noise, or the most steps, within a budget."""

import functools
import math
import operator
from collections.abc import Callable, Mapping

from dpnb.privacy.accounting import DEFAULT_ACCOUNTANT, FIRST_GUESS, DeltaTooSmall, epsilon, find_accountant
from dpnb.privacy.mechanism import Mechanism, PrivacyBudget, compose

MOST_STEPS = 10_000_000  # where a search for the number of steps ends


@functools.lru_cache(maxsize=256)
def calibrate_noise(
    budget: PrivacyBudget, sampling_probability: float, steps: int, accountant: str = DEFAULT_ACCOUNTANT
) -> float:
    """Smallest noise multiplier (to 1e-5 relative) with which `steps` updates stay in the budget.

    Never overshoots: epsilon is at most `budget.epsilon` less a millionth, so that another machine
    whose last digits differ agrees. 0 for an infinite budget.

    Raises:
      ValueError: an unknown accountant; or no noise up to 1e5 is enough (RDP's orders cannot prove an epsilon much below 0.01).
      DeltaTooSmall: no noise is enough for PLD to prove anything at this delta; RDP can.
    """
    find_accountant(accountant)
    if operator.index(steps) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if budget.epsilon == math.inf:
        return 0.0
    target = budget.epsilon * (1 - 1e-6)

    def solve(kind: str, guess: float):  # in x = 1/sigma, along which epsilon grows
        def spent(x):
            return epsilon(Mechanism(1 / x, sampling_probability), steps, budget.delta, kind)

        return _last_that_fits(spent, target, guess, least=1e-5, most=10.0)

    x = solve(FIRST_GUESS, 1.0)
    x = x if accountant == FIRST_GUESS else solve(accountant, x or 1.0)
    if x is None:
        raise ValueError(
            f"no noise multiplier up to 1e5 keeps {steps} steps within epsilon {budget.epsilon} at delta "
            f"{budget.delta} under {accountant}; ask for a larger epsilon or delta, or for PLD"
        )
    return 1 / x


def affordable_steps(
    budget: PrivacyBudget,
    mechanism: Mechanism,
    accountant: str = DEFAULT_ACCOUNTANT,
    spent: Mapping[Mechanism, int] | None = None,
) -> int:
    """Largest n such that n steps of `mechanism`, beside those of the others in `spent`, fit.

    May be 0. The search ends at `MOST_STEPS`, which an infinite budget gives at once, and under PLD where
    more steps would have rounding errors as large as delta.

    Raises:
      ValueError: an unknown accountant.
      DeltaTooSmall: so would one step. RDP can prove an epsilon there.
    """
    find_accountant(accountant)
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

    n = solve(FIRST_GUESS, 1)
    n = n if accountant == FIRST_GUESS else solve(accountant, n or 1)
    return int(n or 0)


def calibrate_steps(
    budget: PrivacyBudget,
    sampling_probability: float,
    noise_multiplier: float,
    accountant: str = DEFAULT_ACCOUNTANT,
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
