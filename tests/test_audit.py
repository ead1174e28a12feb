"""The audit: its bounds where epsilon is known, and its verdict on our trainer, sound and broken.

Where random numbers decide, their seeds are fixed and the false-alarm rate is stated: a bound at confidence
99 % is wrong for at most 1 % of the choices of seeds. Most trainers are audited with 6,000 one-step runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from scipy import stats

from dpnb import audit, privacy
from dpnb.data import Dataset, Split
from dpnb.gradients import ClippedGrad
from dpnb.privacy.noise import GridNoise, grid_bits
from dpnb.training import update

RUNS, SIGMA, Q, DELTA, CANARY, N = 3000, 1.0, 0.5, 1e-2, 0, 8
STATED = privacy.epsilon(privacy.Mechanism(SIGMA, Q), 1, DELTA)
GREY = (125, 123, 114)  # normalised: nearly zero


class Linear(nnx.Module):
    """192 pixels -> 4 logits, all parameters zero at first."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((192, tiny.CLASSES)))

    def __call__(self, images):
        return images.reshape(len(images), -1) @ self.kernel[...]


def dataset(images, labels) -> Dataset:
    split = Split(images.reshape(-1, 8, 8, 3).astype(np.uint8), np.asarray(labels, np.int32))
    return Dataset("canaries", split, split, tuple("abcd"))


@functools.cache  # no test changes a trainer: faults are put into copies, which share compiled programs
def one_canary(n: int = N, pixel: int = 255, **changes) -> update.Trainer:
    """Grey images whose gradients are nearly zero, and the canary: white, of another class."""
    images = np.tile(GREY, (n, 64))
    images[CANARY] = pixel
    labels = np.arange(n) != CANARY
    return trainer(dataset(images, labels), expected_batch_size=n // 2, physical_batch_size=n, **changes)


@functools.cache
def many_canaries(**changes) -> update.Trainer:
    """Grey images, each with one bright pixel of its own: 192 canaries with orthogonal gradients."""
    images = np.tile(GREY, (192, 64))
    np.fill_diagonal(images, 255)
    data = dataset(images, np.zeros(192))
    return trainer(data, expected_batch_size=192, physical_batch_size=64, clip_norm=0.1, **changes)


def trainer(data, *, physical_batch_size, **changes) -> update.Trainer:
    fields = dict(augmult=0, noise_multiplier=SIGMA, clip_norm=1.0, epsilon=100.0) | changes
    devices = jax.devices()[:1]
    return update.make_trainer(
        tiny.experiment(**fields), data, seed=0, model=Linear(), devices=devices,
        physical_batch_size=physical_batch_size,
    )  # fmt: skip


def measured(trainer, **how) -> float:
    bound = audit.two_worlds_bound(*audit.two_worlds(trainer, CANARY, RUNS, **how), delta=DELTA)
    print(f"stated {STATED:.3f}, measured {bound}")
    return bound.epsilon


def no_clipping(patch):
    patch.setattr(ClippedGrad, "_factor", lambda self, norms: 2**self.grid_bits / self.clip_norm + 0 * norms)


@dataclasses.dataclass(frozen=True)
class Times:
    """Noise of another scale; `always`: the seed whose first noise is drawn at every step, or None."""

    sound: GridNoise
    factor: float = 1.0
    always: int | None = None
    seed: int = 0

    def __call__(self, step):
        seed, step = (self.seed, step) if self.always is None else (self.always, 0)
        drawn = dataclasses.replace(self.sound, seed=seed)(step)
        return jax.tree.map(lambda x: np.round(x * self.factor).astype(np.int32), drawn)


def noise_times(trainer, factor: float) -> update.Trainer:
    return dataclasses.replace(trainer, noise=Times(trainer.noise, factor))


def with_update(trainer, change) -> update.Trainer:
    sound = trainer.update
    return dataclasses.replace(trainer, update=lambda *given: change(sound, *given))


def divided_by_the_realised_batch(update_, state, totals, noise):
    new, seen = update_(state, totals, noise)
    factor = 1 / jnp.maximum(seen.examples, 1)  # and by 1, the expected one, before
    params = jax.tree.map(lambda a, b: a + (b - a) * factor, state.params, new.params)
    return new._replace(params=params), seen


# The trainer, in two worlds.


def test_the_trainer_keeps_its_promise():
    """And the attack is a real one: it finds at least a third of the stated epsilon."""
    assert STATED / 3 < measured(one_canary()) <= STATED


def test_missing_clipping_is_caught(monkeypatch):
    no_clipping(monkeypatch)
    assert measured(one_canary.__wrapped__()) > STATED


def test_half_the_noise_is_caught():
    assert measured(noise_times(one_canary(), 1 / 2)) > STATED


def test_noise_for_the_mean_on_the_sum_is_caught():
    """Divided by the expected batch size of 4 once too often."""
    broken = noise_times(one_canary(learning_rate=1.0), 1 / 4)
    moved = audit.parameter_deltas(broken, 20, 1, range(N))  # nobody is in: all noise
    assert np.std(moved) == pytest.approx(SIGMA / 4 / 4, rel=0.05)  # 8 standard deviations
    assert measured(broken) > STATED


def test_noise_that_is_used_again_is_caught():
    trainer = one_canary()
    assert measured(dataclasses.replace(trainer, noise=Times(trainer.noise, always=0))) > STATED


def test_dividing_by_the_realised_batch_size_is_caught_by_the_length_of_the_update():
    """768 coordinates tell the scale of the noise to 3 %, so whether one example or two were in."""
    shorter = dict(score=lambda moved: -np.linalg.norm(moved[:, 0], axis=1))
    assert measured(with_update(one_canary(n=2), divided_by_the_realised_batch), **shorter) > STATED
    assert measured(one_canary(n=2), **shorter) <= STATED


def test_runs_side_by_side_are_those_of_one_update():
    trainer, runs, seed = one_canary(), 5, 7
    without, with_ = audit.two_worlds(trainer, CANARY, runs, steps=3, seed=seed, score=lambda x: x.sum(1))
    for n in range(runs):
        np.testing.assert_allclose(
            without[n], audit.parameter_deltas(trainer, 3, seed + 2 * n, [CANARY]).sum(0), atol=1e-5
        )
        np.testing.assert_allclose(
            with_[n], audit.parameter_deltas(trainer, 3, seed + 2 * n + 1).sum(0), atol=1e-5
        )


def test_excluded_examples_leave_no_trace():
    white, black = one_canary(pixel=255), one_canary(pixel=0)
    for seed in range(10):
        np.testing.assert_array_equal(*[audit.parameter_deltas(t, 2, seed, [CANARY]) for t in (white, black)])
    drawn = [CANARY in dataclasses.replace(white.sampler, seed=s).indices(0) for s in range(10)]
    seen = [
        np.abs(audit.parameter_deltas(white, 1, s) - audit.parameter_deltas(black, 1, s)).max() > 1e-3
        for s in range(10)
    ]
    assert drawn == seen and 0 < sum(drawn) < 10


def test_two_worlds_need_one_physical_batch():
    with pytest.raises(ValueError, match="must hold all examples, got 192, batches of 64"):
        audit.two_worlds(many_canaries(), CANARY, 10)


# The trainer, in one run.


def one_run(trainer) -> float:
    included, scores = audit.one_run(trainer, range(192), steps=1)
    bound = audit.one_run_bound(included, scores, high=24, low=24, delta=1e-4)
    print(f"stated {ONE_RUN_STATED:.3f}, measured {bound}")
    return bound.epsilon


ONE_RUN_SIGMA = 2.0
ONE_RUN_STATED = privacy.epsilon(privacy.Mechanism(ONE_RUN_SIGMA, 1.0), 1, 1e-4)


def test_one_run_of_the_trainer_keeps_its_promise():
    assert one_run(many_canaries(noise_multiplier=ONE_RUN_SIGMA)) <= ONE_RUN_STATED


def test_one_run_catches_missing_clipping(monkeypatch):
    no_clipping(monkeypatch)
    assert one_run(many_canaries.__wrapped__(noise_multiplier=ONE_RUN_SIGMA)) > ONE_RUN_STATED


def test_one_run_catches_an_eighth_of_the_noise():
    assert one_run(noise_times(many_canaries(noise_multiplier=ONE_RUN_SIGMA), 1 / 8)) > ONE_RUN_STATED


# The values that noise can reach, in two worlds of 600 runs. One example moves each of 8,192 coordinates.

MANY, LOW_DELTA = 8192, 1e-5
SHIFT = np.full(MANY, MANY**-0.5, np.float32)  # a clip norm in all


def reached(release) -> audit.Bound:
    bound = audit.two_worlds_bound(*audit.reachable_values(release, SHIFT, 600, 2**21), delta=LOW_DELTA)
    print(bound)
    return bound


def stated(sigma: float) -> float:
    return privacy.epsilon(privacy.Mechanism(sigma, 1.0), 1, LOW_DELTA)


def float_noise(sigma: float):
    """As usual, and broken: what most libraries draw, float32 from JAX."""
    return jax.jit(lambda total, seed: total + sigma * jax.random.normal(jax.random.key(seed), total.shape))


def float_parameters(sigma: float, rate: float, batch: int):
    """Weights of 0.05 after one update of SGD with it."""
    noisy = float_noise(sigma)
    return jax.jit(lambda total, seed: jnp.float32(0.05) - rate / batch * noisy(total, seed))


def grid_noise(sigma: float, batch: int):
    """A noisy sum as the update has it: integers, and floats made of them."""
    bits = grid_bits(sigma, batch)
    noise = GridNoise(0, sigma, bits, np.zeros(MANY))

    def release(total, seed):
        integers = np.trunc(total * 2.0**bits).astype(np.int32) + dataclasses.replace(noise, seed=seed)(0)
        return integers.astype(np.float32) * np.float32(2.0**-bits)

    return release


class Flat(nnx.Module):
    """A vector of weights of 0.05."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.full(MANY, 0.05))

    def __call__(self, images):
        return images[:, 0, :4, 0] * self.kernel[:4]


def grid_parameters(sigma: float, rate: float, batch: int):
    """Parameters after one update by the trainer."""
    experiment = tiny.experiment(
        noise_multiplier=sigma, expected_batch_size=batch, learning_rate=rate, epsilon=1e3
    )
    made = update.make_trainer(experiment, tiny.data(batch), seed=0, model=Flat(), devices=jax.devices()[:1])

    def release(total, seed):
        totals = made.zero()._replace(
            gradient={"kernel": np.trunc(total / made.grad.unit).astype(np.int32)[None]}
        )
        noise = update.draw_noise(update.reseeded(made, seed)[0], 0)
        return np.asarray(made.update(made.state, totals, noise)[0].params["kernel"])

    return release


BROKEN = {"one sum": (float_noise, 100.0), "parameters": (float_parameters, 10.0, 2.0, 4096)}
SOUND = {
    "one sum": (grid_noise, 100.0, 4096),
    "a small batch": (grid_noise, 10.0, 16),
    "a coarse grid": (grid_noise, 30.0, 2**24),
    "parameters": (grid_parameters, 10.0, 0.05, 64),
    "parameters, much noise": (grid_parameters, 100.0, 0.01, 64),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN)
def test_float_noise_betrays_the_total(how):
    """At least 3, where 0.03 and 0.34 would be stated."""
    make, sigma, *more = how
    assert reached(make(sigma, *more)).epsilon > 3 > 8 * stated(sigma)


@pytest.mark.parametrize("how", SOUND.values(), ids=SOUND)
def test_noise_on_the_grid_does_not(how):
    make, sigma, *more = how
    assert reached(make(sigma, *more)).epsilon <= stated(sigma)


# The bounds, on mechanisms whose epsilon is known.


def false_alarms(bounds, epsilon) -> int:
    return sum(b.epsilon > epsilon for b in bounds)


def most_alarms(audits: int, confidence: float) -> int:
    """More of a sound mechanism have probability 1e-6, if each has 1 - confidence."""
    return int(stats.binom.isf(1e-6, audits, 1 - confidence))


def randomised_response(rng, m, epsilon):
    """Coins, and answers that are true with probability e^epsilon / (1 + e^epsilon)."""
    coins = rng.random(m) < 0.5
    return coins, np.where(rng.random(m) < 1 / (1 + np.exp(-epsilon)), coins, ~coins)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_one_run_bound_has_its_confidence_and_is_not_idle(epsilon):
    """Randomised response is the worst case of the theorem: about 10 % of the bounds at 90 % are too high."""
    rng, bounds = np.random.default_rng(0), []
    for _ in range(500):
        coins, answers = randomised_response(rng, 200, epsilon)
        bounds.append(audit.one_run_bound(coins, answers, high=50, low=50, delta=0.0, confidence=0.9))
    assert 25 < false_alarms(bounds, epsilon) <= most_alarms(500, 0.9)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_bound_comes_near_with_many_canaries(epsilon):
    coins, answers = randomised_response(np.random.default_rng(0), 100_000, epsilon)
    bound = audit.one_run_bound(coins, answers, high=40_000, low=40_000, delta=1e-7)
    assert epsilon - 0.1 < bound.epsilon <= epsilon


def test_the_correction_for_delta_is_needed_and_enough():
    """All coins shown with probability delta is (0, delta)-private, and then every guess is right."""
    delta, m = 0.02, 20
    assert audit.p_value(m, m, m, 0.0, 0.0) < delta <= audit.p_value(m, m, m, 0.0, delta)


def test_the_correction_for_delta_covers_randomised_response_that_sometimes_tells_all():
    """With probability delta everything, else randomised response: (epsilon, delta)-private at most."""
    epsilon, delta, m, r = 1.0, 0.01, 40, 20
    p = 1 / (1 + np.exp(-epsilon))
    for right in range(r + 1):
        exact = delta + (1 - delta) * stats.binom.sf(right - 1, r, p)
        assert exact <= audit.p_value(right, r, m, epsilon, delta) + 1e-12


def gaussian(rng, runs, mu):
    return rng.normal(size=runs), rng.normal(size=runs) + mu


@pytest.mark.slow
def test_two_worlds_bound_has_its_confidence_and_comes_near():
    """The Gaussian mechanism at sigma 1, whose epsilon is known."""
    rng, epsilon = np.random.default_rng(0), privacy.epsilon(privacy.Mechanism(1.0, 1.0), 1, 1e-2)
    bounds = [
        audit.two_worlds_bound(*gaussian(rng, 400, 1.0), delta=1e-2, confidence=0.9) for _ in range(200)
    ]
    assert false_alarms(bounds, epsilon) <= most_alarms(200, 0.9)
    near = audit.two_worlds_bound(*gaussian(rng, 200_000, 1.0), delta=1e-2).epsilon
    assert 0.9 * epsilon < near <= epsilon


def test_two_worlds_bound_sees_who_is_missing_as_well():
    """No score is high in one world only, but low ones are: guess "without" there."""
    rng = np.random.default_rng(0)
    without, with_ = 1.2 * rng.random(4000) - 0.2, rng.random(4000)
    assert audit.two_worlds_bound(without, with_, delta=1e-2).epsilon > 3


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_two_worlds_that_are_the_same_accuse_nobody(rate):
    rng = np.random.default_rng(0)
    same = rng.normal(size=(2, 1000)) + 10 * (rng.random((2, 1000)) < rate)
    assert audit.two_worlds_bound(*same, delta=DELTA).epsilon == 0.0


def test_a_bound_says_what_it_rests_on():
    bound = audit.two_worlds_bound(np.zeros(100), np.ones(100), delta=0.01)
    assert str(bound) == (
        f"epsilon >= {bound.epsilon:.3f} at delta = 0.01, 99 % confidence "
        f'("with" guessed rightly 50 of 50 times, wrongly 0 of 50; {bound.epsilon:.3f} at most could be shown)'
    )


def test_no_attack_shows_more_than_its_runs_allow():
    """A perfect attack shows just that, all others less; and `runs_needed` is the first number that is enough."""
    perfect = audit.two_worlds_bound(np.zeros(100), np.ones(100), delta=0.01)
    assert perfect.epsilon == perfect.most == audit.reach(100, 0.01)
    assert audit.two_worlds_bound(np.zeros(100), np.ones(40), delta=0.01).most == audit.reach(40, 0.01)
    assert audit.two_worlds_bound(*np.zeros((2, 100)), delta=0.01).most == perfect.most
    for epsilon in (0.1, 1.0, 3.0, 8.0):
        runs = audit.runs_needed(epsilon, 1e-5)
        assert audit.reach(runs - 1, 1e-5) <= epsilon < audit.reach(runs, 1e-5)
    one_run = audit.one_run_bound([True] * 30, range(30), high=20, delta=0.0)
    assert one_run.epsilon == one_run.most == pytest.approx(np.log(0.01 ** (1 / 20) / (1 - 0.01 ** (1 / 20))))
    coins = [True, False] * 15
    assert audit.one_run_bound(coins, range(30), high=20, delta=0.0).most == one_run.most


@pytest.mark.parametrize("stated, said", [
    (1.0, "broken: epsilon is above the stated 1.000, but for a chance of 0.01"),
    (2.0, "no objection to the stated 2.000, where up to 5.000 could have been shown"),
    (5.0, "cannot tell: 5.000 at most could be shown, and 5.000 is stated; more runs or"),
])  # fmt: skip
def test_a_verdict_says_where_it_cannot_tell(stated, said):
    assert audit.Bound(1.5, 0.0, 0.99, "", 5.0).verdict(stated).startswith(said)


def test_our_own_audits_could_show_the_epsilon_that_they_judge():
    assert audit.reach(RUNS, DELTA) > 2 * STATED and audit.reach(600, LOW_DELTA) > 8 * stated(10.0)
    judged = audit.one_run_bound([True] * 192, range(192), high=24, low=24, delta=1e-4)
    assert judged.most > ONE_RUN_STATED


@pytest.mark.parametrize("arguments, said", [
    (dict(high=0), "1 to m guesses in all"),
    (dict(high=3, low=2), r"got \(4,\), \(4,\) and 3 \+ 2 guesses"),
    (dict(high=1, delta=0.2), r"below 1 / \(2 \* 4 canaries\), got 0.2"),
    (dict(high=1, confidence=1.0), "confidence 1.0"),
    (dict(high=1, scores=[0, 1, 2]), "included and scores must be"),
    (dict(high=1, scores=[0, 1, 2, np.nan]), "1 NaN"),
])  # fmt: skip
def test_one_run_bound_refuses(arguments, said):
    given = dict(included=[True, False, True, False], scores=[3, 2, 1, 0], delta=0.0) | arguments
    with pytest.raises(ValueError, match=said):
        audit.one_run_bound(**given)


def test_two_worlds_bound_refuses():
    with pytest.raises(ValueError, match="at least 4 runs, got 3 and 4"):
        audit.two_worlds_bound(np.zeros(3), np.ones(4), delta=0.1)
    with pytest.raises(ValueError, match="NaN"):
        audit.two_worlds_bound(np.full(4, np.nan), np.ones(4), delta=0.1)
    with pytest.raises(ValueError, match="delta"):
        audit.two_worlds_bound(np.zeros(4), np.ones(4), delta=1.0)
