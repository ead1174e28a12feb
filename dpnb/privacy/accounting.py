"""The accountants: upper bounds on the epsilon of a number of steps of a mechanism.

dp-accounting does the accounting; it is imported when a number is computed.
"""

import contextlib
import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpnb.privacy import answers
from dpnb.privacy.mechanism import DpEvent, Mechanism, dp_accounting_or_error

Runs = Sequence[tuple[DpEvent, int]]  # (event of one step, how many steps of it), ...
Accountant = Callable[[Runs, float, bool], float]  # (runs, delta, coarse) -> epsilon

PLD_INTERVAL = 1e-4  # discretisation of the privacy loss, as in the paper's code since v0.2
PLD_ROUNDING = 2.0**-50  # the share of one step in delta, see `_pld_rounding`
RDP_ROUNDING = 2.0**-48  # the share of one step in the exponent (order - 1) x divergence, over the order
FEW_ORDERS = (8.0, 16.0, 32.0, 63.0)  # some of `_rdp_orders`, which soon say whether PLD may be too costly
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


def is_own(accountant: str) -> bool:
    """Whether the accountant is a function of this file, whose hash then tells which one it is."""
    return find_accountant(accountant).__module__ == __name__


def _is_sampled_gaussian(event: DpEvent) -> bool:
    """Whether an event is one step of `Mechanism`, which dp-accounting composes by multiples of one step."""
    import dp_accounting as dp

    return type(event) is dp.PoissonSampledDpEvent and type(event.event) is dp.GaussianDpEvent


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
    return _rdp(runs, delta, _rdp_orders())


def _rdp(runs: Runs, delta: float, orders: tuple[float, ...]) -> float:
    """`rdp` with these orders; the more there are, the tighter."""
    import numpy as np
    from dp_accounting import rdp as renyi

    alpha, divergences = np.array(orders), np.zeros(len(orders))
    for event, steps in runs:
        if _is_sampled_gaussian(event):
            divergences += steps * _divergences(event, orders)
        else:
            divergences += _composed(_rdp_account(orders), [(event, steps)]).rdp
    rounding = RDP_ROUNDING * sum(steps for _, steps in runs) * alpha / (alpha - 1)
    return float(renyi.compute_epsilon(alpha, np.maximum(divergences, 0) + rounding, delta)[0])


def _rdp_account(orders: tuple[float, ...]) -> Any:
    """An empty RdpAccountant."""
    import dp_accounting as dp
    from dp_accounting import rdp as renyi

    return renyi.RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE)


@functools.lru_cache(maxsize=1024)
def _divergences(event: DpEvent, orders: tuple[float, ...]) -> Any:
    """The Renyi divergences of one step, float64 [orders], computed once in a process for the same orders."""
    made = _composed(_rdp_account(orders), [(event, 1)]).rdp
    made.flags.writeable = False
    return made


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
    # The bound of a few orders takes a hundredth of the time, and is never below that of all of them.
    if _costly(runs, _rdp(runs, delta, FEW_ORDERS)) and _costly(runs, bound := rdp(runs, delta)):
        return bound
    steps = sum(n for _, n in runs)
    rounding = _pld_rounding(steps, len(runs))
    if delta < 2 * rounding:
        raise DeltaTooSmall(
            f"delta must be at least {2 * rounding:.2g} under PLD, whose rounding errors in {steps} steps are "
            f'about as large as that, got {delta}; ask for a larger delta, or with accountant "rdp"'
        )
    interval = PLD_COARSE_INTERVAL if coarse else PLD_INTERVAL
    # The factor: the losses among which it looks up epsilon are a running sum of the interval.
    return float(_pld_epsilon(runs, delta - rounding, interval)) * (1 + 1e-8)


def _pld_epsilon(runs: Runs, delta: float, interval: float) -> float:
    """What dp-accounting's PLDAccountant gives, to the bit; one step is computed once for many runs."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant, privacy_loss_distribution

    if not all(_is_sampled_gaussian(event) for event, _ in runs):
        neighbours = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
        return _composed(PLDAccountant(neighbours, interval), runs).get_epsilon(delta)
    losses = privacy_loss_distribution.identity(value_discretization_interval=interval)
    for event, steps in runs:
        losses = losses.compose(_losses(event, interval).self_compose(steps))
    return losses.get_epsilon_for_delta(delta)


@functools.lru_cache(maxsize=2)  # of tens of megabytes each
def _losses(event: DpEvent, interval: float) -> Any:
    """The privacy loss distribution of one step, most of the work of an epsilon; it is never changed."""
    import dp_accounting as dp
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=event.event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_probability,
        neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


# Recorded by every run: an accountant that is added later is absent from older records.
ALWAYS_RECORDED = ("pld", "rdp")
# An accountant is added here, and nowhere else.
ACCOUNTANTS: dict[str, Accountant] = {"pld": pld, "rdp": rdp}


def epsilon_curve(
    mechanism: Mechanism | DpEvent, steps: Sequence[int], delta: float, accountant: str = DEFAULT_ACCOUNTANT
) -> list[float]:
    """Epsilon after each number of updates in `steps`, for a plot of how the budget is spent.

    A curve that was computed before comes from the cache, if the coarse accountant agrees with each of its
    points to the thousandth by which it may be above. What states or spends an epsilon asks `epsilon`.

    Args and errors are those of `epsilon`.

    >>> [round(e, 2) for e in epsilon_curve(Mechanism(1.0, 0.01), [0, 100, 1000], 1e-5, "rdp")]
    [0.0, 1.22, 2.1]
    """
    bound = find_accountant(accountant)
    return list(_curve(mechanism, tuple(map(int, steps)), delta, accountant, bound))


@functools.lru_cache(maxsize=64)
def _curve(
    mechanism: Mechanism | DpEvent, steps: tuple[int, ...], delta: float, accountant: str, bound: Accountant
) -> Sequence[float]:
    """`epsilon_curve`; `bound` is the accountant itself, as another one may come to have that name."""

    def compute() -> list[float]:
        return [_cached_epsilon(mechanism, n, delta, accountant, bound) for n in steps]

    def holds(curve: Any) -> bool:
        if not isinstance(curve, list) or [type(e) for e in curve] != [float] * len(steps):
            return False
        coarse = (epsilon(mechanism, n, delta, accountant, coarse=True) for n in steps)
        return all(e <= above <= e * 1.001 for e, above in zip(curve, coarse, strict=True))

    if not (isinstance(mechanism, Mechanism) and is_own(accountant)) or accountant == FIRST_GUESS:
        return compute()  # to check it would take as long
    question = {
        "curve": dataclasses.asdict(mechanism),
        "steps": steps,
        "delta": delta,
        "accountant": accountant,
    }
    what = (
        f"epsilon after up to {max(steps, default=0)} steps of sigma {mechanism.noise_multiplier:.4g}, "
        f"q {mechanism.sampling_probability:.4g}, delta {delta:g}, {accountant}"
    )
    return answers.kept(question, what, holds, compute)


@functools.lru_cache(maxsize=1024)
def _cached_epsilon(
    mechanism: Mechanism | DpEvent, steps: int, delta: float, accountant: str, bound: Accountant
) -> float:
    """`epsilon`, kept: a notebook plots again the curve that training showed; `bound` as for `_curve`."""
    return epsilon(mechanism, steps, delta, accountant)


@functools.cache
def _rdp_orders() -> tuple[float, ...]:
    """The orders of the paper's code, v0.1.1."""
    import numpy as np

    return (*np.linspace(1.01, 8, 50), *range(8, 64), *np.linspace(65, 512, 10).astype(int))


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
