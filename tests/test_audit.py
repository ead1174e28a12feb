"""An attack on the whole update, and on three broken ones: is the stated epsilon believable?

Two worlds, with and without a canary whose gradient is huge. A thousand one-step runs in each,
every one with its own seed; the attacker looks at how far the parameters moved along the
canary's gradient. Half of the runs choose the threshold, the other half measure the attack's
rates, whose Clopper-Pearson bounds give a lower bound of epsilon. The right update is wrongly
accused with 1 % of the choices of seeds at most; the seeds are fixed, so it is not by chance.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny
from scipy import stats

from dpnb import privacy, update
from dpnb.clipping import ClippedGrad
from dpnb.data import Dataset, Split
from dpnb.noise import add_noise
from dpnb.sampling import Poisson

RUNS, Q, SIGMA, DELTA, CONFIDENCE = 1000, 0.5, 1.0, 1e-2, 0.99
CANARY = 3


def dataset() -> Dataset:
    """Three grey images whose gradients are small, and the canary: white, of another class."""
    images = np.full((4, 8, 8, 3), 123, np.uint8)
    images[CANARY] = 255
    split = Split(images, np.array([1, 1, 2, 0], np.int32))
    return Dataset("canary", split, split, tuple("abcd"))


@dataclasses.dataclass(frozen=True)
class WithoutCanary:
    sampler: Poisson

    def indices(self, step):
        drawn = self.sampler.indices(step)
        return drawn[drawn != CANARY]


def change(trainer, key, sampler) -> np.ndarray:
    trainer = dataclasses.replace(trainer, sampler=sampler)
    state, _ = update.one_update(trainer, trainer.state._replace(key=key))
    return np.concatenate([
        np.ravel(np.asarray(a) - np.asarray(b))
        for a, b in zip(jax.tree.leaves(trainer.state.params), jax.tree.leaves(state.params), strict=True)
    ])  # fmt: skip


def measured_epsilon(fixed_key: bool = False) -> float:
    """A lower bound of epsilon of one update at DELTA, with CONFIDENCE."""
    experiment = tiny.experiment(
        augmult=0, noise_multiplier=SIGMA, expected_batch_size=2, clip_norm=0.1, epsilon=100.0
    )
    trainer = update.make_trainer(
        experiment, dataset(), seed=0, model=tiny.Linear(), devices=jax.devices()[:1], physical_batch_size=4
    )
    totals = trainer.accumulate(*update.inputs(
        trainer, trainer.state, trainer.zero(), np.full(4, CANARY, np.int32), np.arange(4) < 1,
        update.step_keys(trainer.state.key, 0)[0],
    ))  # fmt: skip
    direction = np.concatenate([np.ravel(x) for x in jax.tree.leaves(totals.gradient)])
    direction = direction / np.linalg.norm(direction)
    scores = []
    for world in (0, 1):
        for n in range(RUNS):
            seed = 1 + n + RUNS * world
            key = update.root_key(0 if fixed_key else seed)
            sampler = Poisson(4, Q, seed)
            scores.append(change(trainer, key, sampler if world else WithoutCanary(sampler)) @ direction)
    return bound(*np.reshape(scores, (2, RUNS)))


def bound(without: np.ndarray, with_: np.ndarray) -> float:
    half = RUNS // 2
    thresholds = np.unique(np.concatenate([without[:half], with_[:half]]))
    guesses = [rates(without[:half], with_[:half], t) for t in thresholds]
    threshold = thresholds[int(np.argmax(guesses))]
    return max(0.0, rates(without[half:], with_[half:], threshold))


def rates(without, with_, threshold) -> float:
    """log((true positive rate - delta) / false positive rate), each at its Clopper-Pearson bound."""
    miss = (1 - CONFIDENCE) / 2
    false, true, n = np.sum(without >= threshold), np.sum(with_ >= threshold), len(without)
    upper = stats.beta.ppf(1 - miss, false + 1, n - false) if false < n else 1.0
    lower = stats.beta.ppf(miss, true, n - true + 1) if true else 0.0
    return math.log((lower - DELTA) / upper) if lower > DELTA else -math.inf


STATED = privacy.epsilon(privacy.Mechanism(SIGMA, Q), 1, DELTA)


def test_the_update_keeps_its_promise():
    """And the attack is a real one: it finds at least a quarter of the stated epsilon."""
    found = measured_epsilon()
    print(f"stated {STATED:.3f}, measured at least {found:.3f}")
    assert STATED / 4 < found < STATED


def test_missing_clipping_is_caught(monkeypatch):
    monkeypatch.setattr(ClippedGrad, "_factor", lambda self, norms: 1 / self.clip_norm + 0 * norms)
    found = measured_epsilon()
    print(f"stated {STATED:.3f}, measured at least {found:.3f}")
    assert found > STATED


def test_half_the_noise_is_caught(monkeypatch):
    monkeypatch.setattr(update, "add_noise", lambda total, key, std: add_noise(total, key, std / 2))
    found = measured_epsilon()
    print(f"stated {STATED:.3f}, measured at least {found:.3f}")
    assert found > STATED


def test_a_key_that_is_used_again_is_caught():
    found = measured_epsilon(fixed_key=True)
    print(f"stated {STATED:.3f}, measured at least {found:.3f}")
    assert found > STATED


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_bound_itself_accuses_nobody(rate):
    """Two worlds that are the same give a bound of zero."""
    rng = np.random.default_rng(0)
    same = rng.normal(size=(2, RUNS)) + 10 * (rng.random((2, RUNS)) < rate)
    assert bound(*same) == 0.0
