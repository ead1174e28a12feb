"""The prediction before a run: its formulas, and that it spends nothing."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
import shared_runs

from dpnb.experiments import Experiment
from dpnb.privacy import ledger
from dpnb.training import cost, devices, update


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A linear model: the formulas are the same, the compilation is not."""
    monkeypatch.setattr(update, "make_model", shared_runs.linear)


def experiment(**changes):
    fields = {"noise_multiplier": 1.0, "steps": 10, "expected_batch_size": 48, "augmult": 2, "delta": 1e-3}
    return Experiment("bands/cost", **{**fields, "physical_batch_size": 4, **changes})


@pytest.fixture(scope="module")
def predicted():
    """Once for all: K = 2, one prediction, with a ledger that must not be opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "make_model", shared_runs.linear)
        patch.setattr(ledger.Ledger, "__init__", lambda *_: pytest.fail("a prediction opened a ledger"))
        patch.chdir(shared_runs.temporary("cost"))
        made = cost.predict(experiment(), shared_runs.bands())
        left = list(shared_runs.pathlib.Path(".").rglob("*"))
    return made, left


def test_views_and_flops(predicted):
    """views = T B K; a linear layer of 192 x 3 needs 2 FLOP a weight forward, and the same for its gradient."""
    views = 10 * 48 * 2
    assert predicted[0].views == views
    multiply_adds = 2 * 192 * 3
    assert multiply_adds <= predicted[0].flops / views <= 3 * multiply_adds + 100


def test_memory_time_and_batch_are_positive(predicted):
    data_bytes = shared_runs.bands().train.images.nbytes
    assert data_bytes < predicted[0].memory < 2**30
    assert 0 < predicted[0].seconds < 600
    assert predicted[0].physical_batch_size == 4


def test_nothing_is_written(predicted):
    assert predicted[1] == []


def test_in_words(predicted):
    text = str(predicted[0])
    for unit in ("views", "FLOP", "MiB per device", "examples", "of updates", "seconds"):
        assert unit in text
    long = dataclasses.replace(predicted[0], seconds=3 * 3600.0)
    assert "about 3.0 hours" in str(long)
    assert [cost.duration(s) for s in (31, 90, 7199)] == ["31 seconds", "1.5 minutes", "120.0 minutes"]


def trainer(**changes):
    return update.make_trainer(experiment(physical_batch_size=None, **changes), shared_runs.bands(), seed=0)


@pytest.mark.parametrize(("augmult", "expected"), [(0, 32), (1, 32), (4, 8), (16, 2), (32, 2)])
def test_cpu_batch_is_32_views_in_microbatches_of_about_eight(augmult, expected):
    made = trainer(augmult=augmult)
    assert devices.per_device_batch_size(made.experiment) == expected
    assert made.grad.microbatch_size * max(augmult, 1) in (8, 16, 32)


def test_free_memory():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30})
    assert devices.free_memory(device) == 70
    assert devices.free_memory(types.SimpleNamespace(memory_stats=lambda: None)) == 8 * 2**30


def test_memory_of_counts_arguments_results_and_temporaries():
    n = 1 << 16
    compiled = jax.jit(lambda x: x @ x.T @ x).lower(jnp.zeros((256, n // 256))).compile()
    assert 3 * 4 * n <= devices.memory_of(compiled) <= 8 * 4 * n
