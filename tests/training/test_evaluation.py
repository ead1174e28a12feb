"""Accuracy and loss: on every image once, whatever the batch size."""

import jax
import numpy as np
import optax
import pytest
import tiny

from dpnb.data import Split
from dpnb.data.augment import normalise
from dpnb.models import functional
from dpnb.training import make_evaluate, session, train
from dpnb.training.evaluation import even_batch_size


@pytest.mark.parametrize("batch_size", [1, 5, 7, 16, 250])
def test_it_agrees_with_the_formula(batch_size):
    params, apply = functional(tiny.Linear())
    params, split = jax.device_put(params, jax.devices()[0]), tiny.data().test
    made = make_evaluate(apply, batch_size)(params, split)
    logits = np.asarray(apply(params, normalise(split.images)))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    assert made.accuracy == 100 * np.mean(logits.argmax(-1) == split.labels)
    assert made.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert made.predictions.dtype == np.int32 and np.array_equal(made.predictions, logits.argmax(-1))


def test_padding_is_not_counted():
    """Fifteen images of another class than what blank images are taken for, and a batch of sixteen."""
    params, apply = functional(tiny.Linear())
    evaluate = make_evaluate(apply, 16)
    images = tiny.data().test.images[:15]
    right = evaluate(params, Split(images, np.zeros(15, np.int32))).predictions
    assert evaluate(params, Split(images, right)).accuracy == 100
    assert evaluate(params, Split(images, (right + 1) % 4)).accuracy == 0


def test_parameters_may_live_on_all_devices():
    params, apply = functional(tiny.Linear())
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    evaluate, split = make_evaluate(apply), tiny.data().test
    assert evaluate(spread, split).accuracy == evaluate(params, split).accuracy


def test_batches_are_even_and_no_more_than_needed():
    for n in (1, 249, 250, 251, 297, 500, 501, 2000, 10_000):
        size = even_batch_size(n)
        assert 1 <= size <= 250
        assert -(-n // size) == -(-n // 250), "as many calls as of 250 images each"
        assert size * -(-n // size) - n < -(-n // 250), "less than one image of padding a call"


@pytest.mark.parametrize(("curve", "times"), [(8, 8), (16, 6), (1000, 6)])
def test_the_end_of_the_curve_is_evaluated_once(curve, times, tmp_path, monkeypatch):
    """Three points of two evaluations each, and all 16 images at the end, unless the last point had them."""
    asked, make = [], session.make_evaluate

    def counting(*terms):
        evaluate = make(*terms)
        return lambda params, split: asked.append(len(split)) or evaluate(params, split)

    monkeypatch.setattr(session, "make_evaluate", counting)
    experiment = tiny.experiment(augmult=0, steps=3, eval_every=1, eval_examples=curve)
    run = train(experiment, tiny.data(), tmp_path, model=tiny.Linear())
    assert asked == [1] + [min(curve, 16)] * 6 + [16] * (times - 6)
    apply = functional(tiny.Linear())[1]
    for name, params, found in (("raw", run.params, run.raw), ("ema", run.ema_params, run.ema)):
        again = make_evaluate(apply)(params, tiny.data().test)
        assert found.accuracy == again.accuracy and np.array_equal(found.predictions, again.predictions)
        head = make_evaluate(apply)(params, tiny.data().test.head(curve))
        assert run.history[-1][f"{name}_accuracy"] == head.accuracy
