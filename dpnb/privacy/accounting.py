"""The accountants: an upper bound on epsilon for so many steps of a mechanism.

All accounting is dp-accounting's, which is imported only when a number is computed.
"""

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpnb.privacy.mechanism import Mechanism, dp_accounting_or_error

PLD_INTERVAL = 1e-4  # discretisation of the privacy loss, as the paper's code has it since v0.2
PLD_ROUNDING = 2.0**-50  # a step's share in delta, see `_pld_rounding`
RDP_ROUNDING = 2.0**-48  # a step's share in the exponent (order - 1) x divergence, over the order
PLD_COARSE_INTERVAL = 1e-3  # a tenth of the time, and an epsilon at most a thousandth higher
DEFAULT_ACCOUNTANT = "pld"  # the tighter one
FIRST_GUESS = "rdp"  # the cheap one, whose answer a search with another accountant begins at


class DeltaTooSmall(ValueError):
    """PLD's rounding errors are as large as this delta, so that it can prove no epsilon there. RDP can."""


def epsilon(
    mechanism, steps: int, delta: float, accountant: str = DEFAULT_ACCOUNTANT, *, coarse: bool = False
) -> float:
    """Smallest epsilon that the accountant proves for `steps` times `mechanism`: an upper bound on the true
    one, whatever its rounding errors.

    Args:
      mechanism: `Mechanism`, or any DpEvent.
      steps: how often it is run; 0 costs nothing.
      delta: in (0, 1). PLD needs one above its rounding errors: 3e-14 for one step, 2e-11 for 10,000.
      accountant: a name in `ACCOUNTANTS`. Neighbouring relation: add or remove one example.
      coarse: a quick look, never below the exact bound and a thousandth above it at most.
    Raises:
      ValueError: an unknown accountant, or a delta or number of steps out of range.
      MissingAccountant: dp-accounting is not installed.
      DeltaTooSmall: PLD can prove nothing at this delta; the message has the smallest it can do.

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
    # (composing `steps` times and composing an event of `steps` give the same number, to the bit)
    runs = list(_runs(dp, event, int(steps)))
    with _quiet():
        return bound(runs, delta, coarse)


def find_accountant(name: str) -> Callable[[list, float, bool], float]:
    """The accountant of that name, as a function (runs of steps, delta, coarse) -> epsilon.

    Raises:
      ValueError: there is none.

    >>> find_accountant("moments")
    Traceback (most recent call last):
    ValueError: accountant must be one of ('pld', 'rdp'), got 'moments'
    """
    if name not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {tuple(ACCOUNTANTS)}, got {name!r}")
    return ACCOUNTANTS[name]


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


def rdp(runs, delta: float, coarse: bool = False) -> float:
    """Renyi DP with the orders of the paper's code (v0.1.1), whose numbers it prints.

    Divergences are rounded up: rounded down to nothing, they would prove an epsilon of 0.

    Args:
      runs: (DpEvent of one step, how many of it), ...
      coarse: makes no difference.
    """
    import dp_accounting as dp
    import numpy as np
    from dp_accounting import rdp as renyi

    account = _composed(renyi.RdpAccountant(_rdp_orders(), dp.NeighboringRelation.ADD_OR_REMOVE_ONE), runs)
    rounding = RDP_ROUNDING * sum(steps for _, steps in runs) * account.orders / (account.orders - 1)
    return float(renyi.compute_epsilon(account.orders, np.maximum(account.rdp, 0) + rounding, delta)[0])


def _costly(runs, bound: float) -> bool:
    """Whether PLD would take more than some seconds and about a gigabyte, for an epsilon up to `bound`.

    Its grid of one step is the wider the less noise there is, that of all the wider the larger epsilon is,
    and at many steps it is cut no narrower than sqrt(epsilon x steps).
    """
    noise = [getattr(getattr(event, "event", event), "noise_multiplier", 1.0) for event, _ in runs]
    return bound > 1000 or bound * sum(steps for _, steps in runs) > 1e8 or min(noise, default=1.0) < 0.15


def _pld_rounding(steps: int, runs: int) -> float:
    """A bound, to first order, on what PLD's delta can be too small by.

    A distribution composed n times is the n-th power of its Fourier transform, whose phases are then wrong
    by up to 2.6 n units in the last place (2^-52), and a sum of its tail by up to about 4 n. (The largest
    that was found in 200 settings against tilted transforms, which have no such error, is 0.7 n.) Each
    run adds what does not grow with n, up to 13 such units; and 2e-15 that is cut off as infinite loss.
    """
    return PLD_ROUNDING * (steps + 16 * runs)


def pld(runs, delta: float, coarse: bool = False) -> float:
    """Privacy loss distributions on a grid of `PLD_INTERVAL`: the tightest bound, at a delta less its rounding errors.

    If that would take minutes and gigabytes (see `_costly`), RDP's number, an upper bound too, is the answer.

    Args:
      runs: (DpEvent of one step, how many of it), ...
      coarse: on a grid of `PLD_COARSE_INTERVAL`.
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
    # (the losses that it looks epsilon up among are a running sum of the interval)
    return float(account.get_epsilon(delta - rounding)) * (1 + 1e-8)


# Name -> function (runs, delta, coarse) -> epsilon. An accountant is added here, and nowhere else.
ACCOUNTANTS: dict[str, Callable[[list, float, bool], float]] = {"pld": pld, "rdp": rdp}


def epsilon_curve(
    mechanism, steps: Sequence[int], delta: float, accountant: str = DEFAULT_ACCOUNTANT
) -> list[float]:
    """Epsilon after each of `steps` updates, for a plot of how the budget is spent; raises as `epsilon`."""
    return [_cached_epsilon(mechanism, int(n), delta, accountant) for n in steps]


@functools.lru_cache(maxsize=1024)
def _cached_epsilon(mechanism: Mechanism, steps: int, delta: float, accountant: str) -> float:
    """A notebook plots the curve that training shows again; PLD takes a second a point."""
    return epsilon(mechanism, steps, delta, accountant)


def _rdp_orders() -> list[float]:
    """The orders of the paper's code, v0.1.1."""
    import numpy as np

    return [*np.linspace(1.01, 8, 50), *range(8, 64), *np.linspace(65, 512, 10).astype(int)]


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
