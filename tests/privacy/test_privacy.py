"""The accountant: published numbers, closed forms, monotonicity, and calibration that never overshoots.

Nothing here is random.
"""

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import shared_runs
from scipy import fft
from scipy.special import log_ndtr

from dpnb import privacy, results
from dpnb.experiments import Experiment
from dpnb.privacy import (
    Mechanism,
    PrivacyBudget,
    accounting,
    affordable_steps,
    calibrate_noise,
    calibrate_steps,
    calibration,
    compose,
    epsilon,
    epsilon_curve,
    events_from_json,
)
from dpnb.results import consistency

Q = 4096 / 50_000
DELTA = 1e-5
IMAGENET = 16384 / 1_271_167

PAPER = [  # sigma, T, q, delta, epsilon under RDP and PLD
    (10.0, 875, Q, 1e-5, 0.9877, 0.9028),
    (10.0, 725, Q, 1e-5, 0.8926, 0.8149),
    (6.0, 1125, Q, 1e-5, 1.9997, 1.8364),
    (5.0, 1593, Q, 1e-5, 2.9825, 2.7472),
    (4.0, 1687, Q, 1e-5, 3.9962, 3.6877),
    (3.0, 1843, Q, 1e-5, 5.9523, 5.5067),
    (3.0, 2468, Q, 1e-5, 7.0456, 6.5293),
    (21.1, 250, 16384 / 50_000, 1e-5, 0.9976, 0.9121),
    (2.5, 71_589, IMAGENET, 8e-7, 7.9998, 7.5088),
]
TABLE = [  # epsilon, sigma, T; then under RDP and PLD: maximal T at sigma, minimal sigma at T
    (1, 10.0, 875, 895, 9.890, 1055, 9.119),
    (2, 6.0, 1125, 1125, 5.999, 1312, 5.567),
    (3, 5.0, 1593, 1609, 4.975, 1863, 4.636),
    (4, 4.0, 1687, 1689, 3.997, 1946, 3.737),
    (6, 3.0, 1843, 1868, 2.981, 2136, 2.802),
    (8, 3.0, 2468, 3066, 2.714, 3477, 2.561),
]


def gaussian_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def solve_epsilon(delta_of, delta):
    """The epsilon at which a decreasing delta_of(epsilon) is delta."""
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def gaussian_epsilon(sigma, steps, delta):
    """Exact, without sampling (Balle and Wang 2018, theorem 8); n steps are one of sigma / sqrt(n)."""
    s = sigma / math.sqrt(steps)

    def delta_of(e):
        return gaussian_cdf(0.5 / s - e * s) - math.exp(e) * gaussian_cdf(-0.5 / s - e * s)

    return solve_epsilon(delta_of, delta)


def sampled_epsilon(sigma, q, delta):
    """Exact, one step of the Poisson-sampled Gaussian: hockey-stick divergence in both directions."""

    def normal(x, mean):
        return gaussian_cdf((x - mean) / sigma)

    def delta_of(e):
        # mixture P = (1 - q) N(0) + q N(1) against N(0); P / N(0) grows along x
        x = sigma**2 * math.log((math.exp(e) - (1 - q)) / q) + 0.5
        mixture = (1 - q) * (1 - normal(x, 0)) + q * (1 - normal(x, 1))
        removing = mixture - math.exp(e) * (1 - normal(x, 0))
        if math.exp(-e) <= 1 - q:
            return removing
        x = sigma**2 * math.log((math.exp(-e) - (1 - q)) / q) + 0.5
        adding = normal(x, 0) - math.exp(e) * ((1 - q) * normal(x, 0) + q * normal(x, 1))
        return max(removing, adding)

    return solve_epsilon(delta_of, delta)


class TestPublishedNumbers:
    @pytest.mark.parametrize("sigma, steps, q, delta, rdp, pld", PAPER)
    def test_epsilon(self, sigma, steps, q, delta, rdp, pld):
        mechanism = Mechanism(sigma, q)
        assert epsilon(mechanism, steps, delta, "rdp") == pytest.approx(rdp, abs=1e-4)
        assert epsilon(mechanism, steps, delta, "pld") == pytest.approx(pld, abs=2e-4)

    @pytest.mark.slow
    def test_low_noise(self):
        # an order that does not converge is left out, which is safe; a user's log prints 7.5038
        assert epsilon(Mechanism(0.7, Q), 18, DELTA, "rdp") == pytest.approx(7.5076, abs=1e-4)
        # the least noise on record is PLD's still
        assert epsilon(Mechanism(0.1875, 0.00512), 77, DELTA, "pld") == pytest.approx(60.4930, abs=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("target, sigma, steps, rdp_steps, rdp_sigma, pld_steps, pld_sigma", TABLE)
    def test_calibration(self, target, sigma, steps, rdp_steps, rdp_sigma, pld_steps, pld_sigma):
        budget = PrivacyBudget(target, DELTA)
        assert calibrate_steps(budget, Q, sigma, "rdp") == rdp_steps
        assert calibrate_steps(budget, Q, sigma, "pld") == pytest.approx(pld_steps, abs=1)
        assert calibrate_noise(budget, Q, steps, "rdp") == pytest.approx(rdp_sigma, abs=1e-3)
        assert calibrate_noise(budget, Q, steps, "pld") == pytest.approx(pld_sigma, abs=1e-3)

    def test_fine_tuning(self):
        budget = PrivacyBudget(1.0, DELTA)
        assert calibrate_noise(budget, 16384 / 50_000, 250, "rdp") == pytest.approx(21.05, abs=0.01)
        assert calibrate_noise(budget, 16384 / 50_000, 250, "pld") == pytest.approx(19.41, abs=0.01)

    def test_the_papers_code_rounds_up_and_overspends(self):
        assert epsilon(Mechanism(10.0, Q), 896, DELTA, "rdp") > 1.0
        assert epsilon(Mechanism(10.0, Q), 895, DELTA, "rdp") <= 1.0


class TestClosedForms:
    @pytest.mark.parametrize("sigma, steps", [(1.0, 1), (2.0, 3), (4.0, 50), (10.0, 10), (30.0, 400)])
    def test_pld_is_the_analytic_gaussian(self, sigma, steps):
        exact = gaussian_epsilon(sigma, steps, DELTA)
        ours = epsilon(Mechanism(sigma, 1.0), steps, DELTA, "pld")
        assert exact - 1e-7 <= ours <= exact * 1.001  # an upper bound, and a tight one

    @pytest.mark.parametrize("sigma, q", [(0.6, 0.1), (1.0, 0.01), (1.0, 0.3), (2.0, 0.08), (0.5, 0.9)])
    def test_pld_is_the_exact_sampled_gaussian(self, sigma, q):
        exact = sampled_epsilon(sigma, q, DELTA)
        ours = epsilon(Mechanism(sigma, q), 1, DELTA, "pld")
        assert exact - 1e-7 <= ours <= exact * 1.001

    @pytest.mark.parametrize("sigma, steps", [(1.0, 1), (4.0, 50), (10.0, 10)])
    def test_rdp_without_sampling(self, sigma, steps):
        orders = np.array([*np.linspace(1.01, 8, 50), *range(8, 64), *np.linspace(65, 512, 10).astype(int)])
        renyi = steps * orders / (2 * sigma**2)
        bounds = renyi + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)
        assert epsilon(Mechanism(sigma, 1.0), steps, DELTA, "rdp") == pytest.approx(bounds.min(), rel=1e-9)

    @pytest.mark.parametrize(
        "sigma, q, steps", [(10.0, Q, 875), (3.0, Q, 100), (1.0, 0.01, 1000), (5.0, 1.0, 9)]
    )
    def test_pld_is_the_tighter_one(self, sigma, q, steps):
        rdp, pld = [epsilon(Mechanism(sigma, q), steps, DELTA, kind) for kind in ("rdp", "pld")]
        assert 0.7 * rdp < pld < rdp


def gaussian_log_delta(sigma, steps, e):
    """Exact, without sampling, with the relative accuracy of float64 however small delta is."""
    s = sigma / math.sqrt(steps)
    upper, lower = log_ndtr(0.5 / s - e * s), e + log_ndtr(-0.5 / s - e * s)
    return upper + math.log(-math.expm1(lower - upper))


def tilted_delta(sigma, q, steps, e):
    """Delta of PLD's own grid, to about 1e-10 relative: composed after multiplying every probability with
    exp(t loss) for the t that has its mean at e, so that the transform is exact where it counts."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    step = accounting.PLD_INTERVAL
    one = pld.from_gaussian_mechanism(sigma, value_discretization_interval=step, sampling_prob=q)
    deltas = []
    for pmf in (one._pmf_remove.to_dense_pmf(), one._pmf_add.to_dense_pmf()):
        loss = (np.arange(pmf.size) + pmf._lower_loss) * step
        log_p = np.log(pmf._probs, out=np.full(pmf.size, -np.inf), where=pmf._probs > 0)

        def tilt(t):
            weights = np.exp(t * loss + log_p - (t * loss + log_p).max())
            return weights / weights.sum()

        low, high = 0.0, 200 / loss[-1]
        for _ in range(60):
            t = (low + high) / 2
            low, high = (t, high) if tilt(t) @ loss < e / steps else (low, t)
        weights = tilt(low)
        mean = weights @ loss
        width = 14 * math.sqrt(steps * (weights @ (loss - mean) ** 2)) + 2 * (loss[-1] - loss[0])
        size = fft.next_fast_len(int(2 * width / step))
        composed = fft.ifft(fft.fft(weights, size) ** steps).real
        at = round(steps * (mean / step - pmf._lower_loss)) - size // 2 + np.arange(size)
        losses = (at + steps * pmf._lower_loss) * step
        log_moment = np.logaddexp.reduce(low * loss + log_p)
        beyond = losses > e
        p = composed[at % size][beyond] * np.exp(steps * log_moment - low * losses[beyond])
        deltas.append(-np.expm1(e - losses[beyond]) @ p)
    return max(deltas)


class TestSmallDeltas:
    """An epsilon is an upper bound, or it is refused."""

    @pytest.mark.slow
    @pytest.mark.parametrize("accountant", privacy.ACCOUNTANTS)
    @pytest.mark.parametrize(
        "sigma, steps", [(0.5, 1), (1.0, 1000), (30.0, 900), (100.0, 10_000), (300.0, 100_000)]
    )
    def test_closed_form(self, accountant, sigma, steps):
        refused = []
        for delta in (1e-3, 1e-5, 1e-8, 1e-10, 1e-11, 1e-12, 1e-13, 1e-15, 1e-18):
            try:
                stated = epsilon(Mechanism(sigma, 1.0), steps, delta, accountant)
            except privacy.DeltaTooSmall:
                refused.append(delta)
                continue
            assert gaussian_log_delta(sigma, steps, stated) <= math.log(delta) + 1e-11
            if accountant == "pld":  # and a tight one
                assert not refused and gaussian_log_delta(sigma, steps, stated * 0.98) > math.log(delta)
        assert (1e-18 in refused and 1e-8 not in refused) if accountant == "pld" else not refused

    @pytest.mark.parametrize(
        "sigma, q, steps", [(10.0, Q, 875), (2.5, 0.0129, 71_589), (100.0, 1.0, 10_000), (1.0, 0.01, 1)]
    )
    def test_the_smallest_delta_that_is_not_refused(self, sigma, q, steps):
        smallest = 2 * accounting._pld_rounding(steps, 1)
        stated = epsilon(Mechanism(sigma, q), steps, smallest)
        assert 0.3 * smallest < tilted_delta(sigma, q, steps, stated) <= smallest
        with pytest.raises(privacy.DeltaTooSmall, match=f"at least {smallest:.2g} .*rdp"):
            epsilon(Mechanism(sigma, q), steps, smallest * 0.99)

    def test_refused_wherever_it_is_asked_for(self):
        m, budget = Mechanism(10.0, 0.1), PrivacyBudget(8.0, 1e-15)
        other = {Mechanism(9.0, 0.1): 5}
        for ask in (
            lambda: epsilon(m, 60, 1e-15),
            lambda: epsilon(compose({m: 30, **other}), 2, 1e-15),
            lambda: epsilon_curve(m, [1, 60], 1e-15),
            lambda: calibrate_noise(budget, 0.1, 60),
            lambda: calibrate_steps(budget, 0.1, 10.0),
            lambda: affordable_steps(budget, m, "pld", other),
        ):
            with pytest.raises(privacy.DeltaTooSmall, match='delta must be at least .*"rdp"'):
                ask()
        sigma = calibrate_noise(budget, 0.1, 60, "rdp")
        assert sigma < 10 and epsilon(Mechanism(sigma, 0.1), 60, 1e-15, "rdp") <= 8.0

    def test_steps_end_where_nothing_can_be_proven(self):
        m, budget = Mechanism(1e4, 0.1), PrivacyBudget(8.0, 1e-11)
        n = affordable_steps(budget, m)
        assert epsilon(m, n, 1e-11) < 1 and affordable_steps(budget, m, "rdp") == privacy.MOST_STEPS
        with pytest.raises(privacy.DeltaTooSmall):
            epsilon(m, n + 1, 1e-11)

    def test_a_divergence_that_is_lost_in_rounding_is_not_none(self):
        """n steps of next to nothing: their total variation is 1e-7, above delta, so epsilon is not 0."""
        m, n = Mechanism(1e5, 1e-5), 10**7
        mu = m.sampling_probability * math.sqrt(n) / m.noise_multiplier
        assert math.erf(mu / math.sqrt(8)) > 1e-7
        assert epsilon(m, n, 1e-10, "rdp") > gaussian_epsilon(1 / mu, 1, 1e-10) > 0


class TestCost:
    """Where PLD would take minutes and gigabytes, RDP answers."""

    COSTLY = ((0.1, 0.5, 1000), (0.1, 1e-4, 1), (1.0, 1.0, 10_000), (1.0, 0.01, 10**9), (100.0, 1.0, 10**7))

    def test_the_cheap_one_is_asked_first(self, monkeypatch):
        monkeypatch.setattr(accounting, "_pld_epsilon", lambda *_: pytest.fail("PLD was asked"))
        for sigma, q, steps in self.COSTLY:
            m = Mechanism(sigma, q)
            rdp = epsilon(m, steps, DELTA, "rdp")
            assert epsilon(m, steps, DELTA) == epsilon(compose({m: steps}), 1, DELTA) == rdp < math.inf
            if sigma == 0.1 and q == 0.5:
                assert affordable_steps(PrivacyBudget(8.0, DELTA), m) == 0
        assert epsilon(compose({Mechanism(0.0, Q): 1, Mechanism(4.0, Q): 9}), 1, DELTA) == math.inf

    def test_a_few_orders_say_so_first_and_are_never_below_all(self):
        """So what they call cheap is cheap; where they say costly, all orders decide."""
        for sigma, q, steps in (
            *self.COSTLY,
            (6.0, Q, 1125),
            (0.7, 0.01, 5),
            (2.0, 0.3, 9000),
            (30.0, 1.0, 3),
        ):
            runs = [(Mechanism(sigma, q).event(), steps)]
            with accounting._quiet():
                few, every = accounting._rdp(runs, DELTA, accounting.FEW_ORDERS), accounting.rdp(runs, DELTA)
            assert 0 < every <= few, (sigma, q, steps)
        assert set(accounting.FEW_ORDERS) < set(accounting._rdp_orders())
        above = [(Mechanism(0.4, 1.0).event(), 60)]  # costly by these few orders, not by all
        few, every = accounting._rdp(above, DELTA, accounting.FEW_ORDERS), accounting.rdp(above, DELTA)
        assert accounting._costly(above, few) and not accounting._costly(above, every)
        assert 0 < accounting.pld(above, DELTA) < every

    def test_searches_do_not_leave_the_budget(self, monkeypatch):
        asked, real = [], accounting._pld_epsilon
        monkeypatch.setattr(accounting, "_pld_epsilon", lambda *a: asked.append(real(*a)) or asked[-1])
        sigma = calibrate_noise(PrivacyBudget(3.0, 2e-6), Q, 321)
        calibrate_steps(PrivacyBudget(3.0, 2e-6), Q, sigma)
        affordable_steps(PrivacyBudget(0.5, 2e-6), Mechanism(0.5, Q))  # not one fits
        assert len(asked) < 40 and max(asked) < 20


def test_a_large_delta_is_warned_of():
    with pytest.warns(UserWarning, match=r"below 1/n = 0.001 for 1000 training examples, got 0.001"):
        privacy.warn_if_delta_is_large(1e-3, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        privacy.warn_if_delta_is_large(0.99e-3, 1000)


@pytest.mark.parametrize("accountant", privacy.ACCOUNTANTS)
class TestEveryAccountant:
    """What any accountant must do, whatever its numbers."""

    def test_no_steps_cost_nothing(self, accountant):
        assert epsilon(Mechanism(1.0, Q), 0, DELTA, accountant) == 0.0

    def test_no_noise_is_not_private(self, accountant):
        assert epsilon(Mechanism(0.0, Q), 1, DELTA, accountant) == math.inf

    def test_monotone(self, accountant):
        def along(name, values):
            at = {"sigma": 4.0, "q": 0.05, "steps": 100, "delta": 1e-5}
            found = []
            for value in values:
                p = {**at, name: value}
                found.append(epsilon(Mechanism(p["sigma"], p["q"]), p["steps"], p["delta"], accountant))
            return np.diff(found)

        assert (along("sigma", [1.5, 2.0, 4.0, 4.01, 8.0, 50.0]) < 0).all()
        assert (along("q", [0.01, 0.02, 0.05, 0.0501, 0.2, 0.9, 1.0]) > 0).all()
        assert (along("steps", [1, 2, 3, 10, 100, 101, 1000]) > 0).all()
        assert (along("delta", [1e-10, 1e-7, 1e-5, 1.1e-5, 1e-3]) < 0).all()

    def test_never_less_than_the_truth(self, accountant):
        for sigma, steps in [(1.0, 1), (4.0, 50), (30.0, 400)]:
            assert (
                epsilon(Mechanism(sigma, 1.0), steps, DELTA, accountant)
                > gaussian_epsilon(sigma, steps, DELTA) - 1e-7
            )
        for sigma, q in [(0.8, 0.1), (1.0, 0.01), (2.0, 0.3)]:
            assert (
                epsilon(Mechanism(sigma, q), 1, DELTA, accountant) > sampled_epsilon(sigma, q, DELTA) - 1e-7
            )

    def test_composition_is_consistent(self, accountant):
        a, b = Mechanism(4.0, Q), Mechanism(6.0, 0.02)
        parts = [{a: 30, b: 20}, {b: 20, a: 30}]
        values = [epsilon(compose(p), 1, DELTA, accountant) for p in parts]
        halves = epsilon(compose({a: 15, b: 10}), 2, DELTA, accountant)
        assert values[0] == pytest.approx(values[1], rel=1e-9)
        assert values[0] == pytest.approx(halves, rel=1e-6)
        assert values[0] > max(epsilon(a, 30, DELTA, accountant), epsilon(b, 20, DELTA, accountant))

    def test_a_count_and_an_event_of_it_are_the_same_to_the_bit(self, accountant):
        # a budget that was read off a mechanism must allow exactly that many steps of it
        m = Mechanism(4.0, Q)
        assert epsilon(m, 37, DELTA, accountant) == epsilon(compose({m: 37}), 1, DELTA, accountant)
        for steps in (1, 37):
            budget = PrivacyBudget(epsilon(m, steps, DELTA, accountant), DELTA)
            assert calibrate_steps(budget, m.sampling_probability, m.noise_multiplier, accountant) == steps

    @pytest.mark.parametrize(
        "target, delta, q", [(0.1, 1e-5, 0.004), (0.7, 1e-3, 0.3), (3.0, 1e-6, 0.02), (6.0, 1e-5, 0.3)]
    )
    def test_steps_never_overshoot_and_waste_none(self, accountant, target, delta, q):
        budget, m = PrivacyBudget(target, delta), Mechanism(3.0, q)
        n = affordable_steps(budget, m, accountant)
        assert epsilon(m, n, delta, accountant) <= target < epsilon(m, n + 1, delta, accountant)

    @pytest.mark.parametrize(
        "target, delta, steps, q",
        [(0.1, 1e-5, 1, 0.3), (0.1, 1e-6, 500, 0.01), (0.7, 1e-3, 60, 0.3), (3.0, 1e-5, 300, 0.1)],
    )
    def test_noise_never_overshoots_and_is_tight(self, accountant, target, delta, steps, q):
        sigma = calibrate_noise(PrivacyBudget(target, delta), q, steps, accountant)
        assert epsilon(Mechanism(sigma, q), steps, delta, accountant) <= target
        assert epsilon(Mechanism(sigma * 0.999, q), steps, delta, accountant) > target

    def test_round_trips(self, accountant):
        budget = PrivacyBudget(2.0, DELTA)
        sigma = calibrate_noise(budget, Q, 700, accountant)
        assert calibrate_steps(budget, Q, sigma, accountant) == 700

    def test_steps_beside_others(self, accountant):
        budget, a, b = PrivacyBudget(1.0, DELTA), Mechanism(10.0, Q), Mechanism(5.0, 0.02)
        alone = affordable_steps(budget, a, accountant)
        n = affordable_steps(budget, a, accountant, {b: 300})
        assert 0 < n < alone
        within, beyond = [epsilon(compose({b: 300, a: k}), 1, DELTA, accountant) for k in (n, n + 1)]
        assert within <= 1.0 < beyond
        assert affordable_steps(budget, a, accountant, {b: 1_000_000}) == 0

    def test_curve(self, accountant):
        m = Mechanism(10.0, Q)
        curve = epsilon_curve(m, [0, 1, 100, 875], DELTA, accountant)
        assert curve == [epsilon(m, n, DELTA, accountant) for n in (0, 1, 100, 875)]
        assert curve == sorted(curve)

    def test_infinite_budget(self, accountant):
        budget = PrivacyBudget(math.inf, DELTA)
        assert calibrate_noise(budget, Q, 100, accountant) == 0.0
        assert affordable_steps(budget, Mechanism(0.0, Q), accountant) == privacy.MOST_STEPS
        with pytest.raises(ValueError, match="choose a number"):
            calibrate_steps(budget, Q, 1.0, accountant)

    def test_not_one_step_fits(self, accountant):
        with pytest.raises(ValueError, match="not one step"):
            calibrate_steps(PrivacyBudget(1.0, DELTA), Q, 0.5, accountant)
        with pytest.raises(ValueError, match="not one step"):
            calibrate_steps(PrivacyBudget(1.0, DELTA), Q, 0.0, accountant)


class TestSearch:
    @pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 3.0])
    @pytest.mark.parametrize("root", [1, 2, 3, 17, 999, 123_457])
    @pytest.mark.parametrize("guess", [1, 10, 5000])
    def test_whole(self, power, root, guess):
        calls = []

        def value(x):
            calls.append(x)
            return x**power

        found = calibration._last_that_fits(
            value, (root + 0.4) ** power, guess, least=1, most=1e7, whole=True
        )
        assert found == root and len(calls) < 40
        assert root in calls and root + 1 in calls  # never believed without evaluating

    @pytest.mark.parametrize("root", [0.003, 0.5, 0.99999, 7.0])
    @pytest.mark.parametrize("guess", [1e-4, 1.0, 10.0])
    def test_continuous(self, root, guess):
        calls = []

        def value(x):
            calls.append(x)
            return math.expm1(x**2) if x < 3 else math.inf

        target = value(root) if root < 3 else 1e300
        found = calibration._last_that_fits(value, target, guess, least=1e-5, most=10.0)
        assert value(found) <= target and found > min(root, 3) * (1 - 2e-5) and len(calls) < 70

    def test_plateaus_infinities_and_ends(self):
        def staircase(x):
            return 0.0 if x < 5 else 1.0 if x < 50 else math.inf

        assert calibration._last_that_fits(staircase, 1.0, 1, least=1, most=1e7, whole=True) == 49
        assert calibration._last_that_fits(staircase, 0.5, 1e6, least=1, most=1e7, whole=True) == 4
        assert calibration._last_that_fits(lambda x: 2.0, 1.0, 3, least=1, most=10) is None
        assert calibration._last_that_fits(lambda x: 0.0, 1.0, 3, least=1, most=10) == 10

    @pytest.mark.parametrize("target", [1.1, 1.0, math.nextafter(2.0, 0), 0.3])
    def test_one_ulp_over_the_target_does_not_fit(self, target):
        def value(x):
            return target if x < 9 else math.nextafter(target, 3)

        assert calibration._last_that_fits(value, target, 1, least=1, most=99, whole=True) == 8


class TestTypes:
    @pytest.mark.parametrize("epsilon_", [0, -1.0, math.nan, 1001, -math.inf])
    def test_bad_epsilon(self, epsilon_):
        with pytest.raises(ValueError, match="epsilon must be"):
            PrivacyBudget(epsilon_, DELTA)

    @pytest.mark.parametrize("delta", [0, 1, -0.1, 2, math.nan])
    def test_bad_delta(self, delta):
        with pytest.raises(ValueError, match="delta must be"):
            PrivacyBudget(1.0, delta)
        with pytest.raises(ValueError, match="delta must be"):
            epsilon(Mechanism(1.0, Q), 1, delta)

    @pytest.mark.parametrize(
        "fields",
        [
            (-1, Q),
            (1e6, Q),
            (math.inf, Q),
            (math.nan, Q),
            (1, 0),
            (1, 1.1),
            (1, math.nan),
            (1, Q, "Poisson"),
        ],
    )
    def test_bad_mechanism(self, fields):
        with pytest.raises(ValueError, match="must be"):
            Mechanism(*fields)

    @pytest.mark.parametrize("accountant", privacy.ACCOUNTANTS)
    def test_too_little_noise_is_accounted_as_none(self, accountant):
        """An infinite epsilon is never too small, and takes no time."""
        for sigma in (0.0, 0.02, 0.099):
            assert not Mechanism(sigma, Q).has_noise
            assert epsilon(Mechanism(sigma, Q), 10**6, DELTA, accountant) == math.inf
        assert Mechanism(0.1, Q).has_noise
        assert epsilon(Mechanism(0.1, Q), 1, DELTA, accountant) < math.inf

    def test_bad_calls(self):
        with pytest.raises(ValueError, match="accountant must be"):
            epsilon(Mechanism(1.0, Q), 1, DELTA, "gdp")
        with pytest.raises(ValueError, match="steps must not be negative"):
            epsilon(Mechanism(1.0, Q), -1, DELTA)
        with pytest.raises(TypeError):
            epsilon(Mechanism(1.0, Q), 1.5, DELTA)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            calibrate_noise(PrivacyBudget(1.0, DELTA), Q, 0)

    def test_unreachable_epsilon(self):
        with pytest.raises(ValueError, match="ask for a larger epsilon"):
            calibrate_noise(PrivacyBudget(0.005, DELTA), Q, 100, "rdp")

    def test_only_poisson_is_valid(self):
        assert (
            Mechanism(1.0, Q).is_exactly_accounted and not Mechanism(1.0, Q, "shuffle").is_exactly_accounted
        )
        assert epsilon(Mechanism(4.0, Q, "shuffle"), 9, DELTA) == epsilon(Mechanism(4.0, Q), 9, DELTA)

    def test_events_survive_json_to_the_last_digit(self):
        m = Mechanism(np.float32(10.1), np.float32(Q))
        events = [{**vars(m), "steps": 5}, {**vars(Mechanism(3, 0.5)), "steps": 2}, {**vars(m), "steps": 1}]
        back = json.loads(json.dumps(events))
        assert privacy.counts_from_json(back) == {m: 6, Mechanism(3, 0.5): 2}
        assert epsilon(events_from_json(back), 1, DELTA) == epsilon(
            compose({m: 6, Mechanism(3, 0.5): 2}), 1, DELTA
        )

    @pytest.mark.parametrize("change", [{"steps": 0}, {"steps": 1.5}, {"clip": 1}, {"sampler": "x"}])
    def test_bad_events(self, change):
        good = {"noise_multiplier": 1.0, "sampling_probability": 0.1, "sampler": "poisson", "steps": 3}
        events_from_json([good])
        with pytest.raises(ValueError):
            events_from_json([{**good, **change}])
        with pytest.raises(ValueError):
            events_from_json([{k: v for k, v in good.items() if k != "sampler"}])


class TestAccountantsAreATable:
    """Name -> function: one more is added in one place, and a name that is not there is refused everywhere."""

    @pytest.mark.parametrize("unknown", ["PLD", "moments", "", None])
    def test_an_unknown_one_is_refused(self, unknown, tmp_path):
        m, budget = Mechanism(4.0, Q), PrivacyBudget(1.0, DELTA)
        nothing, no_budget = {}, PrivacyBudget(math.inf, DELTA)
        refused = pytest.raises(ValueError, match=r"accountant must be one of \('pld', 'rdp'.*\), got ")
        for steps in (0, 3):
            with refused:
                epsilon(m, steps, DELTA, unknown)
        for b in (budget, no_budget):
            with refused:
                calibrate_noise(b, Q, 10, unknown)
            with refused:
                affordable_steps(b, m, unknown)
            with refused:
                calibrate_steps(b, Q, 4.0, unknown)
            with refused:
                privacy.Ledger(tmp_path / "ledger.jsonl", b, unknown)
        with refused:
            Experiment("x", accountant=unknown)
        with refused:
            results.spent({"privacy": nothing}, unknown)

    @pytest.mark.slow
    def test_a_third_one_is_one_entry(self, monkeypatch, tmp_path):
        """It is asked for calibration, by the ledger, and for records and their checks."""
        monkeypatch.setitem(privacy.ACCOUNTANTS, "double", lambda *run: 2 * accounting.rdp(*run))
        budget = PrivacyBudget(2.0, DELTA)
        sigma = calibrate_noise(budget, Q, 50, "double")
        assert sigma == pytest.approx(calibrate_noise(PrivacyBudget(1.0, DELTA), Q, 50, "rdp"), rel=1e-4)
        m = Mechanism(sigma, Q)
        with privacy.Ledger(tmp_path / "ledger.jsonl", budget, "double") as ledger:
            for step in range(50):
                ledger.charge(step, m, "value")
            with pytest.raises(privacy.BudgetExceeded):
                ledger.charge(50, m, "value")
            events = ledger.events()
        assert "(DOUBLE accountant)" in privacy.privacy_statement(events, delta=DELTA, seed_published=True)
        record = shared_runs.record_of("cifar10/wrn-16-4/eps8", "teach", accountant="double", epsilon=100.0)
        assert record["privacy"]["epsilon_double"] == 2 * record["privacy"]["epsilon_rdp"]
        assert "DOUBLE " in results.row(record)
        assert results.summary([Experiment("x")], [])["epsilon_double"].isna().all()
        checks = dict(reversed(check) for check in consistency.accounted(record))
        assert checks and all(checks.values()) and any("DOUBLE" in text for text in checks)
        del record["privacy"]["epsilon_pld"]  # which every record has
        with pytest.raises(KeyError):
            consistency.accounted(record)

    def test_an_older_record_lacks_a_later_one(self, monkeypatch):
        record = shared_runs.record_of("cifar10/wrn-16-4/eps8", "teach")
        monkeypatch.setitem(privacy.ACCOUNTANTS, "double", lambda *run: 2 * accounting.rdp(*run))
        agrees = {text: agrees for agrees, text in consistency.accounted(record)}
        assert [text for text, agreed in agrees.items() if agreed is None] == [
            "epsilon (DOUBLE) is not in this record, so that nothing stands to be compared"
        ]
        assert False not in agrees.values()


class TestWithoutDpAccounting:
    def test_import_is_light(self):
        """Neither dp-accounting nor JAX is loaded by the import alone."""
        code = (
            "import sys, dpnb.privacy, dpnb.privacy.ledger; dpnb.privacy.Ledger; "
            "print([m for m in ('dp_accounting', 'jax', 'scipy') if m in sys.modules])"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"

    def test_the_error_says_what_to_do(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "dp_accounting", None)
        with pytest.raises(privacy.MissingAccountant, match="pip install dp-accounting.*allowed_steps"):
            epsilon(Mechanism(1.0, Q), 1, DELTA)
        assert calibrate_noise(PrivacyBudget(math.inf, DELTA), Q, 5) == 0.0

    def test_unknown_names_are_attribute_errors(self):
        with pytest.raises(AttributeError, match="Leger"):
            _ = privacy.Leger
