"""The Gaussian noise: its scale, its independence, and that it is added once. All keys are fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from dpnb.noise import add_noise
from dpnb.update import make_trainer, root_key, step_keys

N = 20_000


def draw(std, key=0, n=N):
    return np.asarray(add_noise({"w": jnp.zeros(n)}, jax.random.key(key), std)["w"])


def p_value(x, std):
    return stats.kstest(x, "norm", args=(0, std)).pvalue


@pytest.mark.parametrize("std", [0.01, 1.0, 300.0])
def test_it_is_gaussian_of_the_right_scale(std):
    """Kolmogorov-Smirnov at 1 %: one false alarm in a hundred keys; a scale wrong by 5 % always fails."""
    x = draw(std)
    assert p_value(x, std) > 0.01
    assert p_value(x * 1.05, std) < 0.01
    assert p_value(x / 1.05, std) < 0.01
    assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * N)


def test_it_is_independent_across_leaves_and_keys():
    """Correlations within five standard errors."""
    like = {"a": jnp.zeros(N), "b": jnp.zeros(N), "c": jnp.zeros((N // 2, 2))}
    one, two = (add_noise(like, jax.random.key(k), 1.0) for k in (0, 1))
    columns = [np.asarray(x).ravel() for x in (*one.values(), *two.values())]
    correlation = np.corrcoef(columns) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(N)
    lagged = np.corrcoef(columns[0][1:], columns[0][:-1])[0, 1]
    assert abs(lagged) < 5 / np.sqrt(N)


def test_zero_changes_nothing_and_the_sum_is_kept():
    total = {"w": jnp.arange(5.0)}
    assert add_noise(total, jax.random.key(0), 0.0) is total
    noise = add_noise({"w": jnp.zeros(5)}, jax.random.key(3), 0.5)["w"]
    np.testing.assert_array_equal(add_noise(total, jax.random.key(3), 0.5)["w"], total["w"] + noise)


@pytest.mark.parametrize("std", [-1.0, float("inf"), float("nan")])
def test_a_scale_that_protects_nothing_is_refused(std):
    with pytest.raises(ValueError, match="finite standard deviation"):
        add_noise(jnp.zeros(3), jax.random.key(0), std)


@pytest.fixture(scope="module", params=[1, 2, 8])
def empty_updates(request):
    """Changes of the parameters in forty updates on empty batches, in units of the noise."""
    e = tiny.experiment(augmult=0, noise_multiplier=3.0, learning_rate=0.5, clip_norm=0.1)
    trainer = make_trainer(
        e,
        tiny.data(),
        seed=11,
        model=tiny.Linear(),
        devices=jax.devices()[: request.param],
        physical_batch_size=2,
    )
    state, changes = trainer.state, []
    for _ in range(40):
        new, _ = trainer.update(state, trainer.zero())
        changes.append(jax.tree.map(lambda a, b: np.asarray(a - b), state.params, new.params))
        state = state._replace(step=new.step)  # the same parameters every time: no rounding grows
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
        state, _ = trainer.update(trainer.state, trainer.zero())
        copies = [np.asarray(s.data) for s in state.params["layer"]["kernel"].addressable_shards]
        assert all(np.array_equal(c, copies[0]) for c in copies)
        made.append(copies[0])
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_no_two_uses_share_a_key():
    """Augmentation and noise, and all steps and leaves, have keys of their own; so do close seeds."""
    keys = set()
    for seed in (0, 1, 2**32, 2**40 + 1):
        for step in range(50):
            for key in step_keys(root_key(seed), step):
                keys.add(tuple(jax.random.key_data(key).tolist()))
                keys |= {tuple(k) for k in jax.random.key_data(jax.random.split(key, 3)).tolist()}
    assert len(keys) == 4 * 50 * 2 * 4
