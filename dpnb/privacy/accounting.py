"""The accountants: upper bounds on the epsilon of a number of steps of a mechanism.

dp-accounting does the accounting; it is imported when a number is computed.
"""

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpnb.privacy.mechanism import DpEvent, Mechanism, dp_accounting_or_error

Runs = Sequence[tuple[DpEvent, int]]  # (event of one step, how many steps of it), ...
Accountant = Callable[[Runs, float, bool], float]  # (runs, delta, coarse) -> epsilon

PLD_INTERVAL = 1e-4  # discretisation of the privacy loss, as in the paper's code since v0.2
PLD_ROUNDING = 2.0**-50  # the share of one step in delta, see `_pld_rounding`
RDP_ROUNDING = 2.0**-48  # the share of one step in the exponent (order - 1) x divergence, over the order
PLD_COARSE_INTERVAL = 1e-3  # takes a tenth of the time; epsilon is at most a thousandth higher
DEFAULT_ACCOUNTANT = "pld"  # the tighter one
FIRST_GUESS = "rdp"  # the cheap one; a search with another accountant begins at its answer


class DeltaTooSmall(ValueError):
    """PLD cannot prove an epsilon at this delta because its rounding errors are as large; RDP can."""


def epsilon(
    mechanism: Mechanism | DpEvent,
    steps: int,
    delta: float,
    accountant: str = DEFAULT_ACCOUNTANT,
    *,
    coarse: bool = False,
) -> float:
    """The smallest epsilon that the accountant proves for `steps` runs of `mechanism`.

    It is an upper bound on the true epsilon, rounding errors included. The neighbouring relation is to add or
    remove one example.

    Args:
      mechanism: a `Mechanism` or any DpEvent.
      steps: how often the mechanism runs; 0 costs nothing.
      delta: in (0, 1). PLD needs a delta above its rounding errors: 3e-14 for one step, 2e-11 for 10,000.
      accountant: a name in `ACCOUNTANTS`.
      coarse: compute faster; the result is never below the exact bound and at most a thousandth above it.
    Raises:
      ValueError: the accountant is unknown, or delta or the number of steps is out of range.
      MissingAccountant: dp-accounting is not installed.
      DeltaTooSmall: PLD cannot prove an epsilon at this delta; the message names the smallest delta it can.

    >>> round(epsilon(Mechanism(10.0, 4096 / 50_000), 875, 1e-5, accountant="rdp"), 4)
    0.9877
    """
    bound = find_accountant(accountant)
    dp = dp_accounting_or_error()
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if operator.index(steps) < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if steps == 0:
        return 0.0
    event = mechanism.event() if isinstance(mechanism, Mechanism) else mechanism
    # Composing `steps` times and composing an event of `steps` give the same number, to the bit.
    runs = list(_runs(dp, event, int(steps)))
    with _quiet():
        return bound(runs, delta, coarse)


def find_accountant(name: str) -> Accountant:
    """The accountant of that name, a function (runs, delta, coarse) -> epsilon.

    Raises:
      ValueError: no accountant has that name.

    >>> find_accountant("moments")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: accountant must be one of ('pld', 'rdp'...), got 'moments'
    """
    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {tuple(ACCOUNTANTS)}, got {name!r}")
    return ACCOUNTANTS[name]


def _runs(dp: Any, event: DpEvent, times: int) -> Iterator[tuple[DpEvent, int]]:
    """The steps of an event that runs `times` times, as (event of one step, how many steps of it)."""
    if isinstance(event, dp.SelfComposedDpEvent):
        yield from _runs(dp, event.event, times * event.count)
    elif isinstance(event, dp.ComposedDpEvent):
        for part in event.events:
            yield from _runs(dp, part, times)
    else:
        yield event, times


def _composed(account: Any, runs: Runs) -> Any:
    """`account` with all runs composed into it."""
    for event, steps in runs:
        account.compose(event, steps)
    return account


def rdp(runs: Runs, delta: float, coarse: bool = False) -> float:
    """Epsilon by Renyi DP with the orders of the paper's code (v0.1.1), whose numbers it reproduces.

    Divergences are rounded up. If they were rounded down to zero, they would prove an epsilon of 0.

    Args:
      runs: pairs (DpEvent of one step, how many steps of it).
      delta: as in `epsilon`.
      coarse: makes no difference here.

    >>> round(rdp([(Mechanism(10.0, 4096 / 50_000).event(), 875)], 1e-5), 4)
    0.9877
    """
    import dp_accounting as dp
    import numpy as np
    from dp_accounting import rdp as renyi

    account = _composed(renyi.RdpAccountant(_rdp_orders(), dp.NeighboringRelation.ADD_OR_REMOVE_ONE), runs)
    rounding = RDP_ROUNDING * sum(steps for _, steps in runs) * account.orders / (account.orders - 1)
    return float(renyi.compute_epsilon(account.orders, np.maximum(account.rdp, 0) + rounding, delta)[0])


def _costly(runs: Runs, bound: float) -> bool:
    """Whether PLD would take more than some seconds and about a gigabyte, for an epsilon up to `bound`.

    The grid of one step widens as the noise decreases. The grid of all steps widens as epsilon grows, and with many
    steps it is cut no narrower than sqrt(epsilon x steps).
    """
    noise = [getattr(getattr(event, "event", event), "noise_multiplier", 1.0) for event, _ in runs]
    return bound > 1000 or bound * sum(steps for _, steps in runs) > 1e8 or min(noise, default=1.0) < 0.15


def _pld_rounding(steps: int, runs: int) -> float:
    """A first-order bound on how much too small PLD's delta can be.

    A distribution composed n times is the n-th power of its Fourier transform. The phases of that power are wrong by
    up to 2.6 n units in the last place (2^-52), and the sum of the tail by up to about 4 n. (The largest error found
    in 200 settings, against tilted transforms that are free of it, is 0.7 n.) Each run adds an error that does not
    grow with n, of up to 13 such units, and 2e-15 that is cut off as infinite loss.
    """
    return PLD_ROUNDING * (steps + 16 * runs)


def pld(runs: Runs, delta: float, coarse: bool = False) -> float:
    """Epsilon by privacy loss distributions, the tightest bound here.

    Its rounding errors are first subtracted from delta. If PLD would take minutes and gigabytes (see `_costly`), the
    result is RDP's bound instead.

    Args:
      runs: pairs (DpEvent of one step, how many steps of it).
      delta: as in `epsilon`.
      coarse: use the grid of `PLD_COARSE_INTERVAL` in place of `PLD_INTERVAL`.
    Raises:
      DeltaTooSmall: delta is not above the rounding errors.

    >>> round(pld([(Mechanism(10.0, 4096 / 50_000).event(), 875)], 1e-5), 3)
    0.903
    """
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    bound = rdp(runs, delta)
    if _costly(runs, bound):
        return bound
    steps = sum(n for _, n in runs)
    rounding = _pld_rounding(steps, len(runs))
    if delta < 2 * rounding:
        raise DeltaTooSmall(
            f"delta must be at least {2 * rounding:.2g} under PLD, whose rounding errors in {steps} steps are "
            f'about as large as that, got {delta}; ask for a larger delta, or with accountant "rdp"'
        )
    interval = PLD_COARSE_INTERVAL if coarse else PLD_INTERVAL
    account = _composed(PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval), runs)
    # The factor: the losses among which it looks up epsilon are a running sum of the interval.
    return float(account.get_epsilon(delta - rounding)) * (1 + 1e-8)


# Recorded by every run: an accountant that is added later is absent from older records.
ALWAYS_RECORDED = ("pld", "rdp")
# An accountant is added here, and nowhere else.
ACCOUNTANTS: dict[str, Accountant] = {"pld": pld, "rdp": rdp}


def epsilon_curve(
    mechanism: Mechanism | DpEvent, steps: Sequence[int], delta: float, accountant: str = DEFAULT_ACCOUNTANT
) -> list[float]:
    """Epsilon after each number of updates in `steps`, for a plot of how the budget is spent.

    Args and errors are those of `epsilon`.

    >>> [round(e, 2) for e in epsilon_curve(Mechanism(1.0, 0.01), [0, 100, 1000], 1e-5, "rdp")]
    [0.0, 1.22, 2.1]
    """
    return [_cached_epsilon(mechanism, int(n), delta, accountant) for n in steps]


@functools.lru_cache(maxsize=1024)
def _cached_epsilon(mechanism: Mechanism | DpEvent, steps: int, delta: float, accountant: str) -> float:
    """`epsilon`, kept: a notebook plots again the curve that training showed, and PLD takes a second a point."""
    return epsilon(mechanism, steps, delta, accountant)


def _rdp_orders() -> list[float]:
    """The orders of the paper's code, v0.1.1."""
    import numpy as np

    return [*np.linspace(1.01, 8, 50), *range(8, 64), *np.linspace(65, 512, 10).astype(int)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the warnings about Renyi orders that did not converge; leaving an order out is safe."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
