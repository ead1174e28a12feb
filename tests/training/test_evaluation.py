"""Accuracy and loss: on every image once, whatever the batch size."""

import jax
import numpy as np
import optax
import pytest
import tiny

from dpnb.data import Split
from dpnb.data.augment import normalise
from dpnb.models import functional
from dpnb.training import make_evaluate


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
