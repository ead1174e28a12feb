"""The Gaussian noise: exact, of the right scale, independent, added once. All seeds are fixed."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny
from scipy import stats

from dpnb.privacy import noise
from dpnb.privacy.noise import GridNoise, grid_bits, rounded_gaussian
from dpnb.privacy.randomness import random_bytes
from dpnb.training import make_trainer
from dpnb.training.seeds import root_key, step_key
from dpnb.training.update import draw_noise

N = 20_000


def p_value(x, std):
    return stats.kstest(x / std, "norm").pvalue


@pytest.mark.parametrize("std", [2**10, 2**20, 2**30])
def test_it_is_gaussian_of_the_right_scale(std):
    """Kolmogorov-Smirnov at 1 %: one false alarm in a hundred seeds; a scale wrong by 5 % always fails."""
    x = rounded_gaussian(N, std, 0).astype(float)
    assert p_value(x, std) > 0.01
    assert p_value(x * 1.05, std) < 0.01
    assert p_value(x / 1.05, std) < 0.01
    assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * N)


@pytest.mark.parametrize("std", [8, 16, 24])
def test_every_integer_has_its_probability(std):
    """That of the continuous Gaussian rounded to the nearest integer, far into the tails. Chi-square at 1 %."""
    x = rounded_gaussian(400_000, std, 1)
    k = np.arange(-6 * std, 6 * std + 1)
    share = stats.norm.cdf((k + 0.5) / std) - stats.norm.cdf((k - 0.5) / std)
    share[[0, -1]] = stats.norm.cdf((k[0] + 0.5) / std)
    found = np.bincount(np.clip(x - k[0], 0, len(k) - 1), minlength=len(k))
    often = share * len(x) > 5
    groups = [np.append(v[often], v[~often].sum()) for v in (found, share)]
    assert stats.chisquare(groups[0], groups[1] / groups[1].sum() * len(x)).pvalue > 0.01
    wrong = stats.norm.cdf((k + 0.5) / (1.01 * std)) - stats.norm.cdf((k - 0.5) / (1.01 * std))
    assert (
        stats.chisquare(found[often], (wrong / wrong[often].sum())[often] * found[often].sum()).pvalue < 0.01
    )


def proposals(size, *stream):
    """Bin, fraction, threshold and sign of the proposals that `noise._accepted` makes."""
    bits = random_bytes(12 * size, *stream)
    first = [int.from_bytes(bits[8 * i : 8 * i + 8], "little") for i in range(size)]
    thresholds = [int.from_bytes(bits[8 * size + 4 * i :][:4], "little") for i in range(size)]
    return [
        (int(noise._BIN[f & 4095]), f >> 13, u, f >> 12 & 1) for f, u in zip(first, thresholds, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2**17 + 1, 2**27])
def test_floats_only_propose(width):
    """What float64 decides is what 400 decimal digits decide, for every proposal."""
    exact = []
    for i, (j, fraction, threshold, negative) in enumerate(proposals(2000, 3, "label")):
        accepted, value = noise._exactly(j, fraction, threshold, width, 3, "label", i)
        exact += [-value if negative else value] * accepted
    assert np.array_equal(noise._accepted(2000, width, 3, "label"), exact)


def test_what_floats_leave_open_is_decided_by_further_digits():
    """A threshold at the limit, a position on the edge between two integers."""
    j, fraction = 8, 123_456_789
    limit = int(noise._limit(j, fraction, 0))
    assert {noise._exactly(j, fraction, limit, 8, 1, i)[0] for i in range(20)} == {True, False}
    assert (
        noise._exactly(j, fraction, limit - 1, 8, 1)[0]
        and not noise._exactly(j, fraction, limit + 1, 8, 1)[0]
    )
    edge = 2**50 // 3  # a third of it rounds to 0, the rest to 1
    values = {noise._exactly(0, edge, 0, 3, 2, i)[1] for i in range(40)}
    assert values == {0, 1}


def test_the_table_lies_above_the_density():
    """Exactly: every probability of acceptance is at most one, and no slot is lost."""
    assert noise._SLOTS_OF.sum() == noise.SLOTS == len(noise._BIN)
    for j, slots in enumerate(noise._SLOTS_OF):
        assert slots >= 1 and noise._limit(j, 0, 0) <= 2**32
        assert noise.SCALE * math.exp(-((j / noise.BINS) ** 2) / 2) <= slots


def test_what_is_cut_off_is_nothing():
    """Beyond 16 standard deviations, in all of 1e12 samples: below 1e-44."""
    assert 1e12 * 2 * stats.norm.sf(noise.REACH) < 1e-44


def test_the_bits_are_pinned():
    """The same integers on every machine and in every version, as repeated updates rest on them."""
    assert rounded_gaussian(6, 2**20, 7, "noise", 0).tolist() == PINNED


PINNED = [139346, 1058082, 151071, 70482, -14304, -1160812]


def drawn(seed=0, step=0, sizes=(N, N, N)):
    like = {name: np.zeros(size) for name, size in zip("abc", sizes, strict=True)}
    return GridNoise(seed, 3.0, 20, like)(step)


def test_it_is_independent_across_leaves_steps_and_seeds():
    """Correlations within five standard errors."""
    columns = [x.astype(float) for made in (drawn(), drawn(step=1), drawn(seed=1)) for x in made.values()]
    correlation = np.corrcoef(columns) - np.eye(9)
    assert np.abs(correlation).max() < 5 / np.sqrt(N)
    lagged = np.corrcoef(columns[0][1:], columns[0][:-1])[0, 1]
    assert abs(lagged) < 5 / np.sqrt(N)


@pytest.mark.parametrize("sigma", [1e-9, 0.1, 1 / 3, 10.0, 1e5])
@pytest.mark.parametrize("batch", [1, 4096, 2**20])
def test_never_less_than_asked_for_and_no_wrapping(sigma, batch):
    bits = grid_bits(sigma, batch)
    std = GridNoise(0, sigma, bits, ()).std
    assert sigma * 2**bits <= std <= sigma * 2**bits + 8
    assert (batch + 10 * math.sqrt(batch) + 10 * sigma) * 2**bits < 2**31 and 0 <= bits <= 20


@pytest.mark.parametrize("sigma", [-1.0, 0.0, float("inf"), float("nan"), 1e9])
def test_a_scale_that_protects_nothing_is_refused(sigma):
    with pytest.raises(ValueError, match="positive and finite"):
        GridNoise(0, sigma, 20, ())


def test_wrapping_is_modular():
    """Beyond 31 bits the noise is what is left modulo 2^32, as are sums."""
    wide = GridNoise(0, 2.0**30, 0, np.zeros(1000))
    x = rounded_gaussian(1000, 2**30, 0, "noise", 4)
    assert np.array_equal(wide(4).astype(np.int64) % 2**32, x % 2**32) and (np.abs(x) > 2**31).any()


@pytest.fixture(scope="module", params=[1, 2, 8])
def empty_updates(request):
    """Changes of the parameters in forty updates on empty batches, in units of the noise."""
    e = tiny.experiment(augmult=0, noise_multiplier=3.0, learning_rate=0.5, clip_norm=0.1)
    devices = jax.devices()[: request.param]
    trainer = make_trainer(
        e, tiny.data(), seed=11, model=tiny.Linear(), devices=devices, physical_batch_size=2
    )
    changes = []
    for step in range(40):  # the same parameters every time: no rounding grows
        new, _ = trainer.update(trainer.state, trainer.zero(), draw_noise(trainer, step))
        changes.append(jax.tree.map(lambda a, b: np.asarray(a - b), trainer.state.params, new.params))
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(c)]) for c in changes]
    return np.array(flat) / (0.5 * 3.0 / 16)  # rate x sigma x (sensitivity 1, after rescaling) / B


def test_an_update_adds_noise_once_whatever_the_number_of_devices(empty_updates):
    """Noise per device would be sqrt(devices) too large. KS at 1 %, and fails at a 5 % wrong scale."""
    x = empty_updates.ravel()
    assert p_value(x, 1.0) > 0.01
    assert p_value(x, 1.05) < 0.01
    assert p_value(x, 1 / 1.05) < 0.01


def test_updates_are_independent(empty_updates):
    correlation = np.corrcoef(empty_updates) - np.eye(len(empty_updates))
    assert np.abs(correlation).max() < 5.5 / np.sqrt(empty_updates.shape[1])


def test_all_device_counts_draw_the_same_noise():
    """To the bit, so that every device holds the same parameters without talking."""
    e = tiny.experiment(augmult=0)
    made = []
    for devices in (jax.devices()[:1], jax.devices()[:2], jax.devices()):
        trainer = make_trainer(e, tiny.data(), seed=11, model=tiny.Linear(), devices=devices)
        state, _ = trainer.update(trainer.state, trainer.zero(), draw_noise(trainer, 0))
        copies = [np.asarray(s.data) for s in state.params["layer"]["kernel"].addressable_shards]
        assert all(np.array_equal(c, copies[0]) for c in copies)
        made.append(copies[0])
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_a_divided_state_gets_the_same_noise():
    e = tiny.experiment(augmult=0)
    whole, divided = (
        make_trainer(e.replace(shard=shard), tiny.data(), seed=11, model=tiny.Linear())
        for shard in (False, True)
    )
    a, b = (draw_noise(t, 3)["layer"]["kernel"] for t in (whole, divided))
    assert np.array_equal(a, b) and a.dtype == np.int32 and not b.is_fully_replicated


def test_another_seed_or_step_is_other_noise():
    one = drawn()
    for other in (drawn(step=1), drawn(seed=1), drawn(seed=2**64), drawn(seed=2**200)):
        assert all(np.mean(one[k] == other[k]) < 0.01 for k in one)
    assert all(np.array_equal(one[k], drawn()[k]) for k in one)
    assert dataclasses.replace(GridNoise(0, 3.0, 20, np.zeros(9)), seed=5)(0).shape == (9,)


def test_no_two_uses_share_a_key():
    """All seeds and steps of the augmentation have keys of their own, and none shows the seed."""
    keys = set()
    for seed in (0, 1, 2**32, 2**40 + 1, 2**255):
        keys |= {tuple(jax.random.key_data(step_key(root_key(seed), step)).tolist()) for step in range(50)}
        assert root_key(seed).tolist() != [seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]
    assert len(keys) == 5 * 50
