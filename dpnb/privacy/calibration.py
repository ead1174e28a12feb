"""The least noise, or the most steps, that stay within a privacy budget. Neither ever exceeds it.

An answer from the cache is used only if its own epsilon, computed anew, is within the budget.
"""

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from dpnb.privacy import answers
from dpnb.privacy.accounting import (
    DEFAULT_ACCOUNTANT,
    FIRST_GUESS,
    Accountant,
    DeltaTooSmall,
    epsilon,
    find_accountant,
    is_own,
)
from dpnb.privacy.mechanism import Mechanism, PrivacyBudget, compose, dp_accounting_or_error

MOST_STEPS = 10_000_000  # a search for the number of steps ends here


@functools.lru_cache(maxsize=256)
def calibrate_noise(
    budget: PrivacyBudget, sampling_probability: float, steps: int, accountant: str = DEFAULT_ACCOUNTANT
) -> float:
    """The smallest noise multiplier (to 1e-5 relative) with which `steps` updates stay within the budget.

    Epsilon is then at most `budget.epsilon` less a millionth of it, so that a machine whose last digits differ
    agrees. For an infinite budget the noise multiplier is 0.

    Raises:
      ValueError: the accountant is unknown, or no noise multiplier up to 1e5 is enough (RDP's orders cannot prove an
        epsilon much below 0.01).
      DeltaTooSmall: PLD cannot prove an epsilon at this delta with any noise; RDP can.

    >>> round(calibrate_noise(PrivacyBudget(8.0, 1e-5), 4096 / 50_000, 2468, "rdp"), 3)
    2.714
    """
    find_accountant(accountant)
    if operator.index(steps) < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if budget.epsilon == math.inf:
        return 0.0
    target = budget.epsilon * (1 - 1e-6)

    def spent(sigma: float, kind: str, coarse: bool = False) -> float:
        mechanism = Mechanism(sigma, sampling_probability)
        return epsilon(mechanism, steps, budget.delta, kind, coarse=coarse)

    def search() -> float:  # in x = 1/sigma, along which epsilon grows
        def solve(kind: str, guess: float) -> float | None:
            return _last_that_fits(lambda x: spent(1 / x, kind), target, guess, least=1e-5, most=10.0)

        x = solve(FIRST_GUESS, 1.0)
        x = x if accountant == FIRST_GUESS else solve(accountant, x or 1.0)
        if x is None:
            raise ValueError(
                f"no noise multiplier up to 1e5 keeps {steps} steps within epsilon {budget.epsilon} at delta "
                f"{budget.delta} under {accountant}; ask for a larger epsilon or delta, or for PLD"
            )
        return 1 / x

    def holds(sigma: Any) -> bool:  # it keeps the budget, and is not more noise than that takes
        if type(sigma) is not float or not 0.1 <= sigma <= 1e5:
            return False
        return target * 0.998 <= _least(lambda coarse: spent(sigma, accountant, coarse), target) <= target

    if not is_own(accountant):
        return search()
    what = f"sigma of {steps} steps, q {sampling_probability:.4g}, within {budget}, {accountant}"
    question = {"sigma of": steps, "q": sampling_probability, **dataclasses.asdict(budget)}
    return answers.kept({**question, "accountant": accountant}, what, holds, search)


def affordable_steps(
    budget: PrivacyBudget,
    mechanism: Mechanism,
    accountant: str = DEFAULT_ACCOUNTANT,
    spent: Mapping[Mechanism, int] | None = None,
) -> int:
    """The largest n such that n steps of `mechanism` fit the budget, beside the steps of others in `spent`.

    It may be 0. The search ends at `MOST_STEPS`, which is the result for an infinite budget. Under PLD it also ends
    at the number of steps whose rounding errors are as large as delta.

    Args:
      budget: the promise.
      mechanism: what would run.
      accountant: a name in `ACCOUNTANTS`.
      spent: steps of other mechanisms that are already taken, {mechanism: steps}. An entry for `mechanism` itself is
        ignored.
    Raises:
      ValueError: the accountant is unknown.
      DeltaTooSmall: the rounding errors of a single step under PLD are as large as delta; RDP can prove an epsilon.

    >>> affordable_steps(PrivacyBudget(8.0, 1e-5), Mechanism(3.0, 4096 / 50_000), "rdp")
    3066
    """
    bound = find_accountant(accountant)
    if budget.epsilon == math.inf:
        return MOST_STEPS
    dp_accounting_or_error()
    others = tuple((m, n) for m, n in (spent or {}).items() if m != mechanism)
    return _affordable_steps(budget, mechanism, accountant, bound, others)


@functools.lru_cache(maxsize=256)
def _affordable_steps(
    budget: PrivacyBudget,
    mechanism: Mechanism,
    accountant: str,
    bound: Accountant,
    others: tuple[tuple[Mechanism, int], ...],
) -> int:
    """`affordable_steps`, once in a process; `bound` is the accountant, as another may get that name."""

    def spent(n: float, kind: str, coarse: bool = False) -> float:
        counts = {**dict(others), mechanism: int(n)}
        return epsilon(compose(counts), 1, budget.delta, kind, coarse=coarse)

    def search() -> int:
        def solve(kind: str, guess: float) -> float | None:
            def total(n: float) -> float:
                try:
                    return spent(n, kind)
                except DeltaTooSmall:
                    if n == 1:
                        raise
                    return math.inf

            return _last_that_fits(total, budget.epsilon, guess, least=1, most=MOST_STEPS, whole=True)

        n = solve(FIRST_GUESS, 1)
        n = n if accountant == FIRST_GUESS else solve(accountant, n or 1)
        return int(n or 0)

    def holds(n: Any) -> bool:  # n steps keep the budget, and one more is not known to
        if type(n) is not int or not 1 <= n < MOST_STEPS:
            return False
        fits = _least(lambda coarse: spent(n, accountant, coarse), budget.epsilon) <= budget.epsilon
        return fits and _or_infinite(lambda: spent(n + 1, accountant, True)) > budget.epsilon

    if not is_own(accountant):
        return search()
    question = {
        "steps of": dataclasses.asdict(mechanism),
        "accountant": accountant,
        **dataclasses.asdict(budget),
    }
    question["beside"] = [[dataclasses.asdict(m), n] for m, n in others]
    what = (
        f"steps of sigma {mechanism.noise_multiplier:.4g}, q {mechanism.sampling_probability:.4g} "
        f"within {budget}, {accountant}" + (", beside others" if others else "")
    )
    return answers.kept(question, what, holds, search)


def _least(spent: Callable[[bool], float], target: float) -> float:
    """The coarse epsilon, which is never below the exact one, if it is within the target; else that."""
    coarse = _or_infinite(lambda: spent(True))
    return coarse if coarse <= target else _or_infinite(lambda: spent(False))


def _or_infinite(spent: Callable[[], float]) -> float:
    """An epsilon, infinite where none can be proven."""
    with contextlib.suppress(DeltaTooSmall):
        return spent()
    return math.inf


def calibrate_steps(
    budget: PrivacyBudget,
    sampling_probability: float,
    noise_multiplier: float,
    accountant: str = DEFAULT_ACCOUNTANT,
) -> int:
    """The largest number of updates whose epsilon is at most the budget's.

    It is rounded down, and its epsilon was computed. (The paper's code rounds up and overspends by a step or two.)

    Raises:
      ValueError: not even one step fits, or `MOST_STEPS` do.
      DeltaTooSmall: as `affordable_steps`.

    >>> calibrate_steps(PrivacyBudget(8.0, 1e-5), 4096 / 50_000, 3.0, "rdp")
    3066
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
    """The largest x in [least, most], to 1e-5 relative (or whole), with value_at(x) <= target; None if there is none.

    `value_at` must grow. The search brackets x outwards from `guess`, then uses false position (Illinois) on log
    scales. The x that is returned was itself evaluated and fits; x + 1 (or x * 1.00001) was evaluated and does not.
    """

    def gap(x: float) -> float:
        value = value_at(x)
        return -math.inf if value <= 0 else math.log(value / target)  # exactly 0 only if equal

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
