"""One update: the same whatever the batching and the devices; plain SGD without noise and clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

from dpnb.data.augment import views
from dpnb.models import functional
from dpnb.privacy import sampling
from dpnb.training import make_trainer, one_update
from dpnb.training.seeds import step_key
from dpnb.training.update import draw_noise, inputs


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


@functools.cache
def trainer(devices=1, physical=4, model=tiny.Linear, **changes):
    fields = {"augmult": 0, **changes}
    return make_trainer(
        tiny.experiment(**fields), tiny.data(), seed=5, model=model(), devices=jax.devices()[:devices],
        physical_batch_size=physical,
    )  # fmt: skip


def steps(t, n):
    state = t.state
    for _ in range(n):
        state, _ = one_update(t, state)
    return state


@pytest.mark.parametrize("devices, physical", [(1, 1), (1, 7), (2, 3), (8, 2)])
def test_any_physical_batch_and_device_count_give_the_same_update(devices, physical):
    """With augmentation: its keys belong to the example, not to the place in the batch."""
    reference, other = trainer(1, 4, augmult=1), trainer(devices, physical, augmult=1)
    (a, seen_a), (b, seen_b) = (one_update(t, t.state) for t in (reference, other))
    change = np.abs(flat(a.params) - flat(reference.state.params)).max()
    assert change > 0.01
    np.testing.assert_allclose(flat(a.params), flat(b.params), rtol=0, atol=2e-6 * change + 1e-7)
    np.testing.assert_allclose(flat(seen_a), flat(seen_b), rtol=1e-5)


def test_the_sum_is_exact_whatever_the_number_of_devices():
    """Integers: four updates of one, two and eight devices are the same to the bit."""
    reference, *others = (steps(trainer(devices, 4), 4) for devices in (1, 2, 8))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, reference.params, other.params)


def test_noise_that_is_not_known_is_refused():
    """No noise is only what says 0."""
    e = tiny.experiment(noise_multiplier=None, epsilon=8.0)
    with pytest.raises(ValueError, match="noise_multiplier must be known, got None; calibrate it"):
        make_trainer(e, tiny.data(), seed=0, model=tiny.Linear())
    t = trainer(noise_multiplier=0.0, epsilon=float("inf"))
    assert t.noise is None and draw_noise(t, 0) is None


def gradient(t, indices, mask, images=None, params=None):
    """The sum of clipped gradients of one physical batch, flat."""
    key = step_key(t.state.key, t.state.step)
    args = list(inputs(t, t.state, t.zero(), np.asarray(indices, np.int32), np.asarray(mask, bool), key))
    args[0] = args[0] if params is None else params
    totals = t.accumulate(*args)
    return flat(jax.tree.map(lambda x: x.sum(0) * t.grad.unit, totals.gradient)), totals.seen


def test_padding_never_matters():
    """Whichever example stands in the padding, the sum and the statistics are the same to the bit."""
    t = trainer()
    (a, seen_a), (b, seen_b) = (gradient(t, [3, 9, p, p], [1, 1, 0, 0]) for p in (0, 17))
    assert np.array_equal(a, b) and np.array_equal(flat(seen_a), flat(seen_b))
    both = gradient(t, [3, 9, 17, 17], [1, 1, 1, 0])[0]
    assert np.abs(a - both).max() > 1e-3  # a mask that is ignored would be noticed


class Poles(nnx.Module):
    """A linear layer whose input is infinite where the first pixel is bright: gradients inf or NaN."""

    def __init__(self):
        self.linear = tiny.Linear()

    def __call__(self, images):
        bright = images[:, :1, :1, :1] > 0
        return self.linear(jnp.where(bright, images * jnp.inf, images))


def test_non_finite_examples_contribute_nothing():
    t, healthy = trainer(model=Poles), trainer()
    bright = tiny.data().train.images[:, 0, 0, 0] > 130
    bad, good = np.flatnonzero(bright)[0], np.flatnonzero(tiny.data().train.images[:, 0, 0, 0] < 100)[0]
    total, seen = gradient(t, [bad, good, bad, 0], [1, 1, 1, 0])
    expected, _ = gradient(healthy, [good, 0, 0, 0], [1, 0, 0, 0])
    # Two programs round differently, and integers in units of the grid may then differ by one.
    np.testing.assert_allclose(total, expected, rtol=0, atol=1.001 * t.grad.unit)
    assert float(seen.nonfinite.sum()) == 2 and float(seen.examples.sum()) == 3
    padded, _ = gradient(t, [good, bad, bad, bad], [1, 0, 0, 0])  # padding that is not finite
    assert np.array_equal(total, padded)
    assert np.isfinite(flat(seen)).all()


def test_non_finite_parameters_contribute_nothing():
    t = trainer()
    broken = jax.tree.map(lambda p: p * jnp.nan, t.state.params)
    total, seen = gradient(t, [1, 2, 3, 4], [1, 1, 1, 1], params=broken)
    assert (total == 0).all() and float(seen.nonfinite.sum()) == 4


def test_an_empty_batch_is_an_update_of_noise_alone(monkeypatch):
    t = trainer()
    monkeypatch.setattr(sampling.PoissonSampler, "indices", lambda *_: np.zeros(0, np.int32))
    state, seen = one_update(t, t.state)
    noise, _ = t.update(t.state, t.zero(), draw_noise(t, 0))
    assert np.array_equal(flat(state.params), flat(noise.params))
    assert np.abs(flat(state.params) - flat(t.state.params)).max() > 0.01
    assert int(state.step) == 1 and float(seen.examples) == 0


def test_one_example_moves_the_update_by_at_most_rate_over_batch():
    """The sensitivity, through the whole update: rate x 1 / B after rescaling, met with equality."""
    t, rate, batch = trainer(clip_norm=0.01), 0.5, 16
    with_, _ = gradient(t, [3, 9, 5, 0], [1, 1, 1, 0])
    without, _ = gradient(t, [3, 9, 5, 0], [1, 1, 0, 0])
    moved = np.linalg.norm(with_ - without)
    assert (
        moved == pytest.approx(1 - 2**-13, abs=5e-5) and moved <= 1
    )  # clipped below 1, rounded towards zero
    changed = [
        t.update(t.state, t.accumulate(*inputs(
            t, t.state, t.zero(), np.array([3, 9, 5, 0], np.int32), np.array([1, 1, m, 0], bool),
            step_key(t.state.key, t.state.step))), draw_noise(t, 0))[0]
        for m in (0, 1)
    ]  # fmt: skip
    distance = np.linalg.norm(flat(changed[0].params) - flat(changed[1].params))
    assert distance == pytest.approx(rate / batch, rel=1e-3)


def test_without_noise_and_clipping_it_is_plain_sgd():
    """Against a loop that knows nothing of privacy: the mean loss over views, summed over the batch / B."""
    e = dict(noise_multiplier=0.0, clip_norm=float("inf"), augmult=2, epsilon=float("inf"))
    t, data = trainer(**e), tiny.data()
    params, apply = functional(tiny.Linear())
    optimizer = optax.sgd(0.5)
    opt_state = optimizer.init(params)

    @jax.jit
    def batch_gradient(params, images, labels):
        def loss(params):
            logits = apply(params, images.reshape(-1, 8, 8, 3))
            return (
                optax.softmax_cross_entropy_with_integer_labels(logits, jnp.repeat(labels, 2)).sum() / 2 / 16
            )

        return jax.grad(loss)(params)

    draw = jax.jit(jax.vmap(lambda key, i, image: views(jax.random.fold_in(key, i), image, 2), (None, 0, 0)))
    for step in range(3):
        indices = t.sampler.indices(step)
        key = step_key(t.state.key, step)
        images = draw(key, indices, data.train.images[indices])
        changes, opt_state = optimizer.update(
            batch_gradient(params, images, data.train.labels[indices]), opt_state, params
        )
        params = optax.apply_updates(params, changes)
    np.testing.assert_allclose(flat(steps(t, 3).params), flat(params), rtol=1e-5, atol=1e-6)
    assert np.abs(flat(params) - flat(t.state.params)).max() > 0.05


def test_averaging_follows_the_paper():
    """ema <- ema + (1 - min(mu, (1 + t) / (10 + t))) (params - ema), against numpy in float64."""
    mu = 0.3  # reached at t = 3: both branches are used
    t = trainer(ema_decay=mu)
    state, ema = t.state, flat(t.state.params)
    for n in range(6):
        state, _ = one_update(t, state)
        decay = min(mu, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * flat(state.params)
        np.testing.assert_allclose(flat(state.ema), ema, rtol=1e-5, atol=1e-6)
    assert np.abs(ema - flat(state.params)).max() > 1e-3


def test_learning_rate_does_not_depend_on_the_clip_norm():
    """Where every gradient is clipped, C drops out: the sum of unit vectors, noise of sigma / B."""
    small, smaller = (steps(trainer(clip_norm=c), 1) for c in (0.01, 0.001))
    np.testing.assert_allclose(flat(small.params), flat(smaller.params), rtol=1e-5, atol=1e-6)


def test_any_optimizer_can_be_used():
    t = make_trainer(
        tiny.experiment(augmult=0), tiny.data(), seed=5, model=tiny.Linear(), optimizer=optax.adam(0.1),
        devices=jax.devices()[:1],
    )  # fmt: skip
    state, _ = t.update(t.state, t.zero(), draw_noise(t, 0))
    change = np.abs(flat(state.params) - flat(t.state.params))
    np.testing.assert_allclose(change, 0.1, rtol=1e-2)  # Adam's first step, whatever the gradient


def test_noise_of_an_unclipped_sum_is_refused():
    with pytest.raises(ValueError, match="finite standard deviation"):
        make_trainer(
            tiny.experiment(clip_norm=float("inf"), epsilon=8.0), tiny.data(), seed=0, model=tiny.Linear()
        )


def test_both_forms_of_the_gradient_give_the_same_update():
    """Chosen by memory, or asked for; noise and batches are the same, rounding apart."""
    states = {}
    for form in ("auto", "materialised", "two-pass"):
        t = trainer(form=form)
        assert t.grad.form == ("materialised" if form == "auto" else form)
        assert (
            t.form.startswith(t.grad.form) and ("of the device" if form == "auto" else "asked for") in t.form
        )
        states[form], _ = one_update(t, t.state)
    for form in ("auto", "two-pass"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
            states[form].params, states["materialised"].params,
        )  # fmt: skip
