"""Answers on disk: those of a search, and never believed; one step that is computed once, to the bit."""

import json
import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import rdp as renyi
from dp_accounting.pld import PLDAccountant

from dpnb import cache, privacy
from dpnb.privacy import (
    Mechanism,
    PrivacyBudget,
    accounting,
    affordable_steps,
    answers,
    calibrate_noise,
    calibrate_steps,
    calibration,
    epsilon,
    epsilon_curve,
)

Q, DELTA, STEPS = 0.05, 1e-5, 60
BUDGET = PrivacyBudget(3.0, DELTA)
OTHER = {Mechanism(2.0, Q): 7}


def forget():
    """As in a new process."""
    for function in (
        calibrate_noise,
        calibration._affordable_steps,
        accounting._curve,
        accounting._cached_epsilon,
    ):
        getattr(function, "cache_clear", list)()  # unless it is patched


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """Nothing is remembered; the grids of PLD are ten times wider than otherwise, and as much faster."""
    monkeypatch.setattr(accounting, "PLD_INTERVAL", 1e-3)
    monkeypatch.setattr(accounting, "PLD_COARSE_INTERVAL", 2e-3)
    forget()
    yield
    forget()


def sigma(accountant):
    return calibrate_noise(BUDGET, Q, STEPS, accountant)


def steps(accountant):
    return affordable_steps(BUDGET, Mechanism(1.5, Q), accountant)


def steps_beside(accountant):
    return affordable_steps(BUDGET, Mechanism(1.5, Q), accountant, OTHER)


def curve(accountant):
    return epsilon_curve(Mechanism(1.5, Q), [0, 1, 10, STEPS], DELTA, accountant)


ASKED = [(ask, kind) for ask in (sigma, steps, steps_beside) for kind in privacy.ACCOUNTANTS] + [
    (curve, "pld")
]
asked = pytest.mark.parametrize(("ask", "accountant"), ASKED)


@asked
def test_a_second_process_gets_the_same_answer_without_a_search(disk_cache, monkeypatch, ask, accountant):
    with cache.unused():
        right = ask(accountant)
    forget()
    assert ask(accountant) == right
    assert [entry.kind for entry in cache.entries()] == ["accounting"]
    forget()
    monkeypatch.setattr(calibration, "_last_that_fits", lambda *_, **__: pytest.fail("it was searched for"))
    monkeypatch.setattr(accounting, "_cached_epsilon", lambda *_: pytest.fail("the curve was computed"))
    again = ask(accountant)
    assert again == right and type(again) is type(right)


def forge(change):
    """Changes the one answer in the cache, with a checksum that is right."""
    (entry,) = cache.entries()
    said = json.loads((entry.path / "entry.json").read_text())
    del said["checksum"]
    said["value"] = change(said["value"])
    (entry.path / "entry.json").write_text(json.dumps({**said, "checksum": cache._sha256(said)}))
    assert cache.get("accounting", said["key"])  # as sound as any


NEVER = [
    lambda _: None,
    lambda _: "1.0",
    lambda _: math.nan,
    lambda _: -1.0,
    lambda _: [],
    lambda _: math.inf,
]
NEVER += [lambda _: 0, lambda _: True, lambda _: {}, lambda _: 10**9, lambda _: 0.0]
FORGED = {
    sigma: [lambda x: 0.9 * x, lambda x: x * (1 - 1e-4), lambda x: 1.1 * x, lambda x: [x]],
    steps: [lambda n: n + 1, lambda n: 2 * n, lambda n: n // 2, lambda n: 1, float],
    curve: [
        lambda e: [0.9 * x for x in e],
        lambda e: [*e[:-1], e[-1] * 1.01],
        lambda e: [*e[:1], 0.0, *e[2:]],
        lambda e: e[:-1],
        lambda e: [*e[:-1], math.nan],
    ],
}
FORGED[steps_beside] = FORGED[steps]


class Computed(Exception):
    """The answer is not believed, and is computed."""


@asked
def test_a_forged_answer_is_not_believed(disk_cache, monkeypatch, ask, accountant):
    """Even one that would cost accuracy and not privacy: much noise, few steps, a high epsilon."""
    right = ask(accountant)
    (path,) = disk_cache.rglob("entry.json")
    genuine = path.read_bytes()

    def compute(*_, **__):
        raise Computed

    for change in NEVER + FORGED[ask]:
        path.write_bytes(genuine)
        forge(change)
        forget()
        with monkeypatch.context() as patch, pytest.raises(Computed):
            patch.setattr(calibration, "_last_that_fits", compute)
            patch.setattr(accounting, "_cached_epsilon", compute)
            ask(accountant)
    if ask is not steps_beside:
        forget()
        assert ask(accountant) == right
        assert json.loads(path.read_bytes())["value"] == right  # it was put right


@pytest.mark.parametrize("accountant", privacy.ACCOUNTANTS)
def test_whatever_the_cache_says_the_budget_is_kept(disk_cache, monkeypatch, accountant):
    """Answers around the right one, some of which are taken: never more epsilon, and hardly less."""
    right, n, taken = sigma(accountant), steps(accountant), set()
    for factor in (0.999, 0.9999, 1.0, 1.0001, 1.001):
        forget()
        monkeypatch.setattr(cache, "get", lambda *_: cache.Found(float(right * factor), {}))
        got = sigma(accountant)
        taken.add(got)
        assert (
            0.997 * BUDGET.epsilon <= epsilon(Mechanism(got, Q), STEPS, DELTA, accountant) <= BUDGET.epsilon
        )
    assert min(taken) == right
    for said in (n - 1, n + 1):
        forget()
        monkeypatch.setattr(cache, "get", lambda *_: cache.Found(said, {}))
        assert epsilon(Mechanism(1.5, Q), steps(accountant), DELTA, accountant) <= BUDGET.epsilon


def test_a_stated_epsilon_is_always_computed(disk_cache, monkeypatch):
    """`epsilon` is what records state and what verification compares."""
    for name in ("get", "put"):
        monkeypatch.setattr(cache, name, lambda *_: pytest.fail("the cache was asked"))
    for accountant in privacy.ACCOUNTANTS:
        assert epsilon(Mechanism(1.5, Q), STEPS, DELTA, accountant) > 0
        ledger = privacy.Ledger(None, PrivacyBudget(math.inf, DELTA), accountant)
        ledger.charge(0, Mechanism(1.5, Q), "a")
        assert ledger.spent > 0


@pytest.mark.parametrize("ask", [sigma, steps, curve])
def test_another_version_or_code_computes_again(disk_cache, monkeypatch, ask):
    right = ask("pld")
    for name in ("versions", "code"):
        monkeypatch.setattr(cache, name, lambda *_: "another")
        forget()
        assert ask("pld") == right
    assert len(cache.entries()) == 3


def test_the_key_holds_all_that_decides_the_answer(disk_cache):
    """Each of these is another question, and has its own answer."""
    found = {
        sigma("rdp"), sigma("pld"),
        calibrate_noise(BUDGET, Q, STEPS + 1), calibrate_noise(BUDGET, Q / 2, STEPS),
        calibrate_noise(PrivacyBudget(3.1, DELTA), Q, STEPS),
        calibrate_noise(PrivacyBudget(3.0, 1e-6), Q, STEPS),
    }  # fmt: skip
    assert len(found) == len(cache.entries()) == 6
    numbers = {steps("pld"), steps("rdp"), steps_beside("pld"), affordable_steps(BUDGET, Mechanism(1.4, Q))}
    assert len(numbers) == 4 and len(cache.entries()) == 10
    affordable_steps(BUDGET, Mechanism(1.5, Q, "shuffle"))
    assert len(cache.entries()) == 11


def test_an_accountant_from_elsewhere_is_not_kept(disk_cache, monkeypatch):
    """Nothing in the key would tell it from another one of its name."""
    m = Mechanism(1.5, Q)
    for factor in (2.0, 3.0):
        monkeypatch.setitem(privacy.ACCOUNTANTS, "mine", lambda *run, f=factor: f * accounting.rdp(*run))
        calibrate_noise.cache_clear()
        noise = calibrate_noise(BUDGET, Q, STEPS, "mine")
        assert epsilon(Mechanism(noise, Q), STEPS, DELTA, "rdp") == pytest.approx(3.0 / factor, rel=1e-3)
        n = calibrate_steps(BUDGET, Q, 1.5, "mine")
        assert factor * epsilon(m, n, DELTA, "rdp") <= 3.0 < factor * epsilon(m, n + 1, DELTA, "rdp")
        assert epsilon_curve(m, [5], DELTA, "mine") == [factor * epsilon(m, 5, DELTA, "rdp")]
    assert not cache.entries()


def test_what_cannot_be_answered_is_not_kept(disk_cache):
    with pytest.raises(privacy.DeltaTooSmall):
        calibrate_noise(PrivacyBudget(8.0, 1e-15), 0.1, 60)
    with pytest.raises(ValueError, match="no noise multiplier"):
        calibrate_noise(PrivacyBudget(0.005, DELTA), 4096 / 50_000, 100, "rdp")
    assert not cache.entries()
    tiny, loud = PrivacyBudget(0.01, DELTA), Mechanism(0.5, Q)
    assert affordable_steps(tiny, loud) == 0
    forget()
    assert affordable_steps(tiny, loud) == 0  # computed again: nothing proves that none fits


def test_the_last_steps_that_can_be_proven(disk_cache):
    """One step more is refused by the accountant, and not by the budget."""
    m, budget = Mechanism(1e4, 0.1), PrivacyBudget(8.0, 2e-12)
    right = affordable_steps(budget, m)
    forget()
    assert affordable_steps(budget, m) == right


def test_the_code_of_the_key_is_there():
    assert cache.code(*answers.CODE) and len(answers.CODE) == 4


def library(runs, delta, interval):
    account = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for event, n in runs:
        account.compose(event, n)
    return account.get_epsilon(delta)


def library_rdp(runs):
    account = renyi.RdpAccountant(accounting._rdp_orders(), dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event, n in runs:
        account.compose(event, n)
    rounding = accounting.RDP_ROUNDING * sum(n for _, n in runs) * account.orders / (account.orders - 1)
    return renyi.compute_epsilon(account.orders, np.maximum(account.rdp, 0) + rounding, DELTA)[0]


def sampled(noise, q):
    return dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise))


COMPOSED = [
    [(sampled(1.5, Q), 1)],
    [(sampled(1.5, Q), 333)],
    [(sampled(1.5, Q), 10)],
    [(sampled(0.7, 1.0), 3)],
    [(sampled(1.5, Q), 10), (sampled(2.0, 0.01), 500)],
    [(sampled(1.5, Q), 10), (sampled(2.0, 0.01), 500), (sampled(1.5, Q), 11)],
    [(dp.GaussianDpEvent(2.0), 5)],
    [(sampled(1.5, Q), 10), (dp.GaussianDpEvent(20.0), 5)],
    [(sampled(1.5, Q), 10), (dp.NonPrivateDpEvent(), 1)],
    [(sampled(1.5, Q), 333)],  # once more, after what shares its step
]


def test_one_step_computed_once_gives_the_same_to_the_bit():
    """Against dp-accounting's own accountants, which compute everything for each number."""
    for interval, some in ((1e-3, COMPOSED), (1e-4, COMPOSED[:3])):
        for runs in some:
            assert accounting._pld_epsilon(runs, DELTA, interval) == library(runs, DELTA, interval)
    with accounting._quiet():
        for runs in COMPOSED * 2:
            assert accounting.rdp(runs, DELTA) == library_rdp(runs)


def test_one_step_is_computed_once():
    m = Mechanism(1.5, Q)
    accounting._losses.cache_clear()
    accounting._divergences.cache_clear()
    epsilon_curve(m, [1, 10, 20], DELTA)
    affordable_steps(BUDGET, m)
    assert accounting._losses.cache_info().misses == 1
    assert accounting._divergences.cache_info().misses == 2  # with a few orders, and with all
