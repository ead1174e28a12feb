"""The checks before the first charge: sound trainers pass, and each fault is found, by name.

All seeds are fixed. A sound trainer of other seeds fails in one of 10^9 cases at most.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from scipy import stats

from dpnb.data import load
from dpnb.data.stand_ins import write_folders
from dpnb.gradients import ClippedGrad
from dpnb.models.layers import Conv
from dpnb.privacy import PoissonSampler
from dpnb.privacy.noise import GridNoise
from dpnb.training import UnsoundTrainer, check_trainer, checks, update
from dpnb.training.features import FeatureDataset, FeatureSplit


def fresh(devices: int = 1, model=None, optimizer=None, data=None, **changes) -> update.Trainer:
    model = tiny.Linear() if model is None else model
    return update.make_trainer(
        tiny.experiment(**changes), data or tiny.data(), seed=3, model=model, optimizer=optimizer,
        devices=jax.devices()[:devices],
    )  # fmt: skip


# No trainer changes: tests put pieces into copies, which share compiled programs.
make = functools.cache(fresh)


def put_in(trainer, **pieces) -> update.Trainer:
    return dataclasses.replace(trainer, **pieces)


def failures(trainer) -> str:
    report = check_trainer(trainer)
    failed = [line for line in report.lines if line.startswith("FAILED")]
    assert report.ok == (not failed)
    return "\n".join(failed)


# Sound trainers.


class Convolutional(nnx.Module):
    """A convolution, a group norm, a leaf of one number, and a mean: [8, 8, 3] -> 4 logits."""

    def __init__(self):
        self.conv = Conv(3, 8, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(8, tiny.CLASSES, rngs=nnx.Rngs(0))
        self.gain = nnx.Param(jnp.ones(()))

    def __call__(self, images):
        return self.gain[...] * self.linear(nnx.relu(self.norm(self.conv(images))).mean((1, 2)))


SOUND = {
    "linear": dict(),
    "two devices": dict(devices=2),
    "eight devices, divided": dict(devices=8, shard=True),
    "two passes": dict(form="two-pass", augmult=0),
    "Adam": dict(optimizer=optax.adam(0.01)),
    "momentum and a clip of the noisy gradient": dict(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9))
    ),
    "every second update": dict(optimizer=optax.MultiSteps(optax.sgd(0.1), 2)),
    "convolutional": dict(model=Convolutional()),
    "convolutional, two passes, Adam, two devices": dict(
        model=Convolutional(), form="two-pass", optimizer=optax.adam(0.01), devices=2
    ),
    "one example at a time": dict(physical_batch_size=1),
    "everybody, always": dict(expected_batch_size=64),
    "hardly anybody": dict(expected_batch_size=1, noise_multiplier=0.3),
    "a coarse grid": dict(noise_multiplier=1e5),  # the most that is accounted
    "shuffled": dict(sampler="shuffle"),
}


@pytest.mark.parametrize("how", SOUND.values(), ids=SOUND)
def test_sound_trainers_pass(how):
    report = check_trainer(make(**how))
    assert report.ok, report
    report.raise_if_failed()
    assert all(line.startswith(("ok: ", "not checked: update: neither")) for line in report.lines), report


def test_a_report_says_nothing_about_the_data():
    """Other images of the same number: the same words."""
    assert check_trainer(fresh(data=tiny.data(seed=1))) == check_trainer(fresh(data=tiny.data(seed=2)))


def test_the_trainer_stays_as_it_was():
    """And reads no training image: with none that could be read the same update follows."""
    trainer = make()
    before, _ = update.one_update(trainer, trainer.state)
    check_trainer(trainer)
    after, _ = update.one_update(trainer, trainer.state)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    blind = put_in(trainer, feed=type(trainer.feed)(tiny.data(seed=9).train, trainer.mesh))
    assert check_trainer(blind) == check_trainer(trainer)


def test_streamed_photographs_pass(tmp_path):
    write_folders(tiny.data(), tmp_path / "noise", side=12)
    photographs = load("noise", data_dir=tmp_path, image_size=8)
    assert check_trainer(fresh(data=photographs, image_size=8, devices=2)).ok


def test_features_pass_and_those_that_are_too_large_to_copy(monkeypatch):
    numbers = np.random.default_rng(0).normal(size=(64, 192)).astype(np.float32)
    split = FeatureSplit(numbers, tiny.data().train.labels)
    trainer = fresh(data=FeatureDataset("f", split, split, tuple("abcd"), "", "1", "none"), augmult=0)
    assert check_trainer(trainer).ok
    monkeypatch.setattr(checks, "LARGE", 0)
    assert check_trainer(trainer).ok


def test_what_cannot_be_checked_is_said():
    report = check_trainer(make(noise_multiplier=0.0))
    assert report.ok and "without noise nothing is private" in str(report)
    frozen = check_trainer(make(optimizer=optax.sgd(0.0)))
    assert frozen.ok and "neither sum nor noise moved .params['layer']['bias'], .params" in str(frozen)
    short = check_trainer(make(clip_norm=1e6))
    assert short.ok and "no made-up example has a gradient beyond the clip norm" in str(short)


def test_no_program_is_compiled_twice():
    trainer = fresh(devices=2)
    check_trainer(trainer)
    update.one_update(trainer, trainer.state)
    assert trainer.update._cache_size() == trainer.accumulate._cache_size() == 1


# Noise.


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise with a fault: a function of (how the sound noise is drawn, step)."""

    sound: GridNoise
    change: object
    seed: int = 0

    def __call__(self, step):
        return self.change(dataclasses.replace(self.sound, seed=self.seed), step)


def with_noise(change, **how) -> update.Trainer:
    trainer = make(**how)
    return put_in(trainer, noise=Noise(trainer.noise, change))


def on_the_bias(change):
    return lambda draw, step: jax.tree.map(lambda x: change(x) if x.shape == (4,) else x, draw(step))


def times(factor):
    return lambda draw, step: jax.tree.map(lambda x: (x * factor).astype(np.int32), draw(step))


def uniform(draw, step):
    """Of the same standard deviation."""
    rng, half = np.random.default_rng([draw.seed % 2**32, step]), int(draw.std * 3**0.5)
    return jax.tree.map(lambda x: rng.integers(-half, half + 1, x.shape, np.int32), draw(step))


NOISE = {
    "halved": (times(0.5), "['layer']['kernel'] has 0.5 times the standard deviation"),
    "a tenth too small": (times(0.9), "['layer']['kernel'] has 0.9 times"),
    "doubled": (times(2), "['layer']['kernel'] has 2 times"),
    "left out on one leaf": (on_the_bias(np.zeros_like), "['layer']['bias'] has 0 times"),
    "halved on one leaf": (on_the_bias(lambda x: x // 2), "['layer']['bias'] has 0."),
    "of one sign": (lambda draw, step: jax.tree.map(np.abs, draw(step)), "has mean 0.8 standard deviations"),
    "uniform": (uniform, "off the Gaussian one"),
    "the same at every step": (lambda draw, step: draw(0), "at step 0 and ['layer']['bias'] at step 1"),
    "the same at every second step": (lambda draw, step: draw(step % 2), "at step 0 and ['layer']['bias'] at step 2"),
    "the same for every seed": (
        lambda draw, step: dataclasses.replace(draw, seed=0)(step),
        "['layer']['bias'] at step 0 and ['layer']['bias'] at step 0 of another seed",
    ),
    "nearly the same at every step": (
        lambda draw, step: jax.tree.map(lambda a, b: (0.8 * a + 0.6 * b).astype(np.int32), draw(0), draw(step + 1)),
        "are not independent",
    ),
    "of the wrong type": (lambda draw, step: jax.tree.map(np.float32, draw(step)), "it must be int32"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", NOISE.values(), ids=NOISE)
def test_wrong_noise_is_found(change, said):
    assert said in failures(with_noise(change))


def test_noise_shared_by_two_leaves_is_found():
    class Twice(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Param(jnp.zeros((192, tiny.CLASSES))) for _ in range(2))

        def __call__(self, images):
            return images.reshape(len(images), -1) @ (self.a[...] + self.b[...])

    def shared(draw, step):
        return dict.fromkeys("ab", draw(step)["a"])

    assert "['a'] at step 0 and ['b'] at step 0 are not independent" in failures(
        with_noise(shared, model=Twice())
    )


def test_no_noise_at_all_is_found():
    trainer = make()
    assert "no noise is drawn" in failures(put_in(trainer, noise=None))
    quiet = put_in(trainer, experiment=trainer.experiment.replace(noise_multiplier=4.0))
    assert "['kernel'] has 0.5 times the standard deviation" in failures(quiet)


# Updates.


def changed(how=None, **options):
    """A trainer whose update is `how` (the sound update, state, totals, noise)."""
    trainer = make(**options)
    return put_in(trainer, update=jax.jit(lambda *given: how(trainer.update, *given)))


def left_out(sound, state, totals, noise):
    noise["layer"]["bias"] *= 0
    return sound(state, totals, noise)


def left_out_later(sound, state, totals, noise):
    return sound(state, totals, jax.tree.map(lambda x: jnp.where(state.step == 0, x, 0), noise))


def added_in_floats(sound, state, totals, noise):
    gradient = jax.tree.map(lambda t: t.sum(0).astype(jnp.float32)[None], totals.gradient)
    return sound(
        state, totals._replace(gradient=gradient), jax.tree.map(lambda x: x.astype(jnp.float32), noise)
    )


def added_on_every_device(sound, state, totals, noise):
    return sound(state, totals._replace(gradient=jax.tree.map(jnp.add, totals.gradient, noise)), jax.tree.map(
        jnp.zeros_like, noise))  # fmt: skip


def halved(sound, state, totals, noise):
    return sound(state, totals, jax.tree.map(lambda x: x // 2, noise))


def by_the_realised_batch(sound, state, totals, noise):
    new, seen = sound(state, totals, noise)
    factor = 1 / jnp.maximum(seen.examples, 1)
    return new._replace(
        params=jax.tree.map(lambda a, b: a + (b - a) * factor, state.params, new.params)
    ), seen


def peeking(sound, state, totals, noise):
    """The step is as long as the sum is, before the noise."""
    new, seen = sound(state, totals, noise)
    norm = optax.tree.norm(jax.tree.map(lambda t: t.sum(0).astype(jnp.float32), totals.gradient))
    return new._replace(ema=jax.tree.map(lambda x: x * (1 + 1e-9 * norm), new.ema)), seen


def remembering(sound, state, totals, noise):
    """The optimizer's memory gets the clean sum of one leaf."""
    new, seen = sound(state, totals, noise)
    trace = new.optimizer[0].trace
    trace["layer"]["bias"] = totals.gradient["layer"]["bias"].sum(0).astype(jnp.float32)
    return new._replace(optimizer=(new.optimizer[0]._replace(trace=trace), *new.optimizer[1:])), seen


signs = optax.stateless(lambda updates, params: jax.tree.map(lambda g: -0.01 * jnp.sign(g), updates))
UPDATES = {
    "noise left out on one leaf": (left_out, dict(), ".params['layer']['bias']"),
    "the same, Adam": (left_out, dict(optimizer=optax.adam(0.01)), ".params['layer']['bias']"),
    "noise left out from the second step on": (left_out_later, dict(), ".params['layer']['bias']"),
    "added in floats": (added_in_floats, dict(), ".params['layer']['kernel']"),
    "added on every device": (added_on_every_device, dict(devices=2), ".params['layer']['bias']"),
    "halved": (halved, dict(), ".params['layer']['kernel']"),
    "halved, and only signs are released": (halved, dict(optimizer=signs), ".params['layer']['kernel']"),
    "a memory without noise": (remembering, dict(optimizer=optax.sgd(0.1, 0.9)), "['bias']"),
    "peeking at the length of the sum": (peeking, dict(), ".ema['layer']['kernel']"),
    "divided by the realised batch": (by_the_realised_batch, dict(), "batch's own size or losses"),
}


@pytest.mark.parametrize("how, options, said", UPDATES.values(), ids=UPDATES)
def test_wrong_updates_are_found(how, options, said):
    found = failures(changed(how, **options))
    assert "update: " in found and said in found


def test_every_leaf_that_lacks_noise_is_named():
    found = failures(changed(left_out))
    assert "['layer']['bias']" in found and "kernel" not in found


def test_a_program_that_never_rounds_the_same_is_compared_to_rounding():
    """As some on accelerators; noise that is left out is still seen, and so is a clip after the sum."""
    rng = np.random.default_rng(0)

    def shaken(trainer):
        def new(*given):
            state, seen = trainer.update(*given)
            shake = lambda x: x * (1 + 1e-7 * rng.integers(-1, 2, x.shape).astype(np.float32))
            return state._replace(params=jax.tree.map(shake, state.params)), seen

        def accumulate(params, totals, images, labels, indices, mask, key):
            totals = trainer.accumulate(params, totals, images, labels, indices, mask, key)
            shake = lambda t: t + rng.integers(-1, 2, t.shape, np.int32)
            return totals._replace(gradient=jax.tree.map(shake, totals.gradient))

        return put_in(trainer, update=new, accumulate=accumulate)

    report = check_trainer(shaken(make()))
    assert report.ok and str(report).count("does not repeat itself to the bit") == 2
    assert "['layer']['bias'] must be" in failures(shaken(changed(left_out)))
    assert "clip: " in failures(shaken(with_sums(after_the_sum)))


# Clips.


def with_sums(sums, **how) -> update.Trainer:
    """A trainer whose physical batches are summed by `sums` (trainer, losses of params, labels -> a sum in clips)."""
    trainer = make(augmult=0, **how)
    unit = 2.0**trainer.grad.grid_bits

    def accumulate(params, totals, images, labels, indices, mask, key):
        x = images[indices].reshape(len(indices), -1) / 255.0
        before = jax.tree.map(lambda t: t[0] / unit, totals.gradient)
        more = sums(trainer, params, x, labels[indices], mask, before)
        integers = jax.tree.map(lambda t, m: t + (m * unit).astype(jnp.int32), totals.gradient, more)
        return totals._replace(gradient=integers)

    return put_in(trainer, accumulate=jax.jit(accumulate))


def each(trainer, params, x, labels):
    def loss(params, x, label):
        return optax.softmax_cross_entropy_with_integer_labels(trainer.apply(params, x[None])[0], label)

    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)


def clipped(g, weight):
    norms = jax.vmap(optax.tree.norm)(g)
    return jax.tree.map(lambda x: jnp.einsum("e,e...->...", 0.99 * weight / jnp.maximum(norms, 1), x), g)


def soundly(trainer, params, x, labels, mask, before):
    return clipped(each(trainer, params, x, labels), mask)


def not_at_all(trainer, params, x, labels, mask, before):
    return jax.tree.map(lambda x: jnp.einsum("e,e...->...", mask * 1.0, x), each(trainer, params, x, labels))


def after_the_sum(trainer, params, x, labels, mask, before):
    total = not_at_all(trainer, params, x, labels, mask, before)
    return jax.tree.map(lambda x: x / jnp.maximum(optax.tree.norm(total), 1), total)


def by_the_largest(trainer, params, x, labels, mask, before):
    """Each by the same factor, that of the longest: nobody is longer than the clip norm."""
    g = each(trainer, params, x, labels)
    factor = 1 / jnp.maximum((mask * jax.vmap(optax.tree.norm)(g)).max(), 1)
    return jax.tree.map(lambda x: jnp.einsum("e,e...->...", mask * factor, x), g)


def leaf_by_leaf(trainer, params, x, labels, mask, before):
    return {"layer": {k: clipped(g, mask) for k, g in each(trainer, params, x, labels)["layer"].items()}}


def after_batch_norm(trainer, params, x, labels, mask, before):
    x = (x - x.mean(0)) / (x.std(0) + 0.1)
    return clipped(each(trainer, params, x, labels), mask)


def padding_counts(trainer, params, x, labels, mask, before):
    return clipped(each(trainer, params, x, labels), jnp.ones(len(mask)))


def with_the_sum_before(trainer, params, x, labels, mask, before):
    """The total is shortened to three clip norms."""
    more = soundly(trainer, params, x, labels, mask, before)
    total = jax.tree.map(jnp.add, before, more)
    factor = jnp.minimum(1, 3 / optax.tree.norm(total))
    return jax.tree.map(lambda t, b: factor * t - b, total, before)


CLIPS = {
    "not at all": (not_at_all, "moves the sum by"),
    "after the sum": (after_the_sum, "with others or without"),
    "by the largest of the batch": (by_the_largest, "with others or without"),
    "leaf by leaf": (leaf_by_leaf, "moves the sum by"),
    "after batch norm": (after_batch_norm, "with others or without"),
    "padding counts": (padding_counts, "moves the sum by"),
    "with what was summed before": (with_the_sum_before, "clip: "),
}


@pytest.mark.parametrize("sums, said", CLIPS.values(), ids=CLIPS)
def test_wrong_clips_are_found(sums, said):
    found = failures(with_sums(sums))
    assert "clip: " in found and said in found


def test_a_right_clip_by_other_code_passes():
    assert not failures(with_sums(soundly, physical_batch_size=1))


def test_what_rounds_by_its_place_is_measured_and_more_than_rounding_is_refused():
    """As WRN-10-1 on some processors, whose clipped gradients differ by 1.6e-5 clip norms between two places."""

    def by_place(size):
        def sums(trainer, params, x, labels, mask, before):
            return clipped(each(trainer, params, x, labels), mask * (1 - size * (jnp.arange(len(x)) % 2)))

        return check_trainer(with_sums(sums))

    report = by_place(1e-4)
    assert report.ok and 1e-5 < report.rounding < 2e-4 and "which is rounding" in str(report)
    assert check_trainer(with_sums(soundly, physical_batch_size=1)).rounding == 0
    assert "with others or without" in str(by_place(0.1)) and not by_place(0.1).ok


@pytest.mark.parametrize("factor", [2.0, 1.01])
def test_a_clip_that_is_too_long_is_found(monkeypatch, factor):
    right = ClippedGrad._factor
    monkeypatch.setattr(ClippedGrad, "_factor", lambda self, norms: factor * right(self, norms))
    assert f"moves the sum by {factor:.3g}" in failures(fresh())


def test_float_sums_are_found():
    trainer = make()

    def accumulate(*given):
        totals = trainer.accumulate(*given)
        return totals._replace(gradient=jax.tree.map(lambda t: t.astype(jnp.float32), totals.gradient))

    assert "sums must be int32" in failures(put_in(trainer, accumulate=accumulate))


# Samplers.


@dataclasses.dataclass(frozen=True)
class Draw:
    """Indices with a fault: a function of (the sound sampler, step)."""

    sound: PoissonSampler
    change: object
    seed: int = 0

    def indices(self, step):
        return self.change(dataclasses.replace(self.sound, seed=self.seed), step)


def times_q(factor):
    return lambda sound, step: dataclasses.replace(sound, probability=factor * sound.probability).indices(
        step
    )


def of_one_size(sound, step):
    return np.random.default_rng([sound.seed % 2**32, step]).permutation(sound.n)[:16]


def in_pairs(sound, step):
    half = dataclasses.replace(sound, n=sound.n // 2).indices(step)
    return np.concatenate([2 * half, 2 * half + 1])


def some_more_often(sound, step):
    rare, often = (dataclasses.replace(sound, probability=q).indices(step) for q in (0.2, 0.3))
    return np.concatenate([rare[rare < 32], often[often >= 32]])


DRAWS = {
    "always the same": (lambda sound, step: sound.indices(0), "successive batches share"),
    "the first of those drawn": (lambda sound, step: sound.indices(step)[:16], "cut short"),
    "cut short where large": (lambda sound, step: sound.indices(step)[:22], "cut short"),
    "a fixed size": (of_one_size, "the size of batches"),
    "q too large": (times_q(1.1), "the size of batches"),
    "q too small": (times_q(0.9), "the size of batches"),
    "in turns": (lambda sound, step: sound.indices(step % 5), "how often examples come"),
    "in pairs": (in_pairs, "neighbouring examples share"),
    "half of them more often": (some_more_often, "how often examples come"),
    "some twice": (lambda sound, step: np.append(sound.indices(step), 0).repeat(2), "different examples"),
    "whatever the seed": (lambda sound, step: dataclasses.replace(sound, seed=1).indices(step), "two seeds"),
    "beyond the data": (lambda sound, step: sound.indices(step) + 1, "different examples of 0 to 63"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", DRAWS.values(), ids=DRAWS)
def test_wrong_draws_are_found(change, said):
    trainer = make()
    found = failures(put_in(trainer, sampler=Draw(trainer.sampler, change)))
    assert "sampler: " in found and said in found and "q = 0.25" in found or "different" in said


def test_a_batch_of_the_feed_that_lacks_its_rest_is_found():
    trainer = make()

    class Feed(type(trainer.feed)):
        def batches(self, sampler, step, size):
            return (batch for batch in super().batches(sampler, step, size) if batch[-1].all())

    short = put_in(trainer, feed=Feed(tiny.data().train, trainer.mesh))
    assert "must hold all that is drawn" in failures(short)


def test_shuffled_batches():
    trainer = make(sampler="shuffle")
    assert "nominal" in str(check_trainer(trainer))
    assert "not all of 16" in failures(put_in(trainer, sampler=PoissonSampler(64, 0.25, 0)))
    assert "comes again" in failures(
        put_in(trainer, sampler=Draw(trainer.sampler, lambda s, step: s.indices(0)))
    )
    poisson = put_in(trainer, experiment=trainer.experiment.replace(sampler="poisson"))
    assert "the size of batches" in failures(poisson)


# The report, and how often it is wrong.


def test_a_failed_report_is_raised_with_all_that_it_found():
    trainer = changed(left_out)
    report = check_trainer(put_in(trainer, sampler=PoissonSampler(64, 0.5, 0)))
    with pytest.raises(UnsoundTrainer) as raised:
        report.raise_if_failed()
    assert str(report) in str(raised.value) and str(report).count("FAILED") == 2


@pytest.mark.slow
def test_false_alarms_of_the_sampler_are_as_rare_as_stated(monkeypatch):
    """Of 1,000 sound samplers a tenth at most may be accused at ALARM = 0.2; more than 142 have probability 1e-5."""
    monkeypatch.setattr(checks, "ALARM", 0.2)
    rng = np.random.default_rng(0)
    found = [bool(checks._poisson([rng.random((30, 12)) < 0.3 for _ in range(2)], 0.3)) for _ in range(1000)]
    assert stats.binom.sf(142, 1000, 0.1) < 1.1e-5
    assert 10 < sum(found) <= 142


def test_false_alarms_of_the_noise_are_as_rare_as_stated(monkeypatch):
    monkeypatch.setattr(checks, "ALARM", 0.2)
    rng = np.random.default_rng(0)

    def accused():
        draws = [{k: np.round(rng.normal(0, 1000, n)) for k, n in (("a", 7), ("b", 200))} for _ in range(3)]
        return not all(ok for ok, _ in checks._drawn(draws, 1000.0))

    assert 2 < sum(accused() for _ in range(1000)) <= 142


@pytest.mark.parametrize("n, q", [(1, 0.5), (10, 0.01), (64, 0.25), (5, 1.0)])
def test_binomial_counts_become_normal(n, q):
    """Kolmogorov-Smirnov at 1 %."""
    rng = np.random.default_rng(0)
    z = checks._normal(rng.binomial(n, q, 20_000), n, q, rng)
    assert stats.kstest(z, "norm").pvalue > 0.01
    if q < 1:
        assert stats.kstest(checks._normal(rng.binomial(n, q, 20_000), n, 1.1 * q, rng), "norm").pvalue < 0.01
