"""Programs that trainers share: what would be the same is traced once, and anything else is another program."""

from unittest import mock

import jax
import numpy as np
import pytest
import shared_runs
import tiny
from flax import nnx

from dpnb.data import Dataset, Recipe
from dpnb.gradients import convolution
from dpnb.models import structure
from dpnb.training import UnsoundTrainer, cost, make_trainer, one_update, train, update


class Network(nnx.Module):
    """Settings, a convolution and what else a test wants it to hold."""

    def __init__(self, scale=1.0, seed=0, more=None, dtype=None):
        self.scale, self.more = scale, more
        self.layer = nnx.Conv(3, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.scale * self.layer(x).mean((1, 2))


def trainer(programs, model=Network, seed=5, devices=1, physical=4, data=None, **changes):
    return make_trainer(
        tiny.experiment(**{"augmult": 1, **changes}), data or tiny.data(), seed=seed, model=model(),
        devices=jax.devices()[:devices], physical_batch_size=physical, programs=programs,
    )  # fmt: skip


@pytest.fixture
def traced(monkeypatch):
    return shared_runs.count_traces(monkeypatch)


def test_other_seeds_rates_and_budgets_share_and_get_what_they_would_have_had(traced):
    programs = {}
    first = trainer(programs)
    one_update(first, first.state)
    assert len(traced) == 1
    for changes in ({"learning_rate": 2.0}, {"steps": 3, "delta": 1e-4}, {"ema_decay": 0.5}):
        with_them = trainer(programs, lambda: Network(seed=7), seed=6, **changes)
        state, seen = one_update(with_them, with_them.state)
        assert with_them.accumulate is first.accumulate and len(traced) == 1
        alone = trainer(None, lambda: Network(seed=7), seed=6, **changes)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema, seen), one_update_of(alone))
        assert len(traced) == 2
        traced.pop()
    assert len(programs) == 1


def one_update_of(t):
    state, seen = one_update(t, t.state)
    return state.params, state.ema, seen


class Other(Network):
    """The same by another name."""


class OtherRecipe(Dataset):
    recipe = Recipe(std=(1.0, 1.0, 1.0))


CHANGES = {
    "clip norm": {"clip_norm": 0.5}, "views": {"augmult": 2}, "no views": {"augmult": 0}, "no noise": {"noise_multiplier": 0.0},
    "grid": {"noise_multiplier": 300.0}, "form": {"form": "two-pass"}, "devices": {"devices": 2},
    "microbatches": {"physical": 8}, "setting": {"model": lambda: Network(2.0)}, "type of a setting": {"model": lambda: Network(1)},
    "half precision": {"model": lambda: Network(dtype="bfloat16")},
    "class": {"model": lambda: Other()},
    "recipe": {"data": OtherRecipe(**{f: getattr(tiny.data(), f) for f in ("name", "train", "test", "classes")})},
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_program_is_told_apart(what):
    programs = {}
    first, second = trainer(programs), trainer(programs, **CHANGES[what])
    assert first.accumulate is not second.accumulate and len(programs) == 2
    assert trainer(programs).accumulate is first.accumulate
    assert trainer(programs, **CHANGES[what]).accumulate is second.accumulate


def test_formulations_are_told_apart():
    programs, made = {}, []
    for name in ("im2col", "grouped", "im2col"):
        with convolution.formulation(name):
            made.append(trainer(programs).accumulate)
    assert made[0] is made[2] and made[0] is not made[1]


def test_batches_that_are_read_from_disk_are_told_apart(monkeypatch):
    """Their images are those of the batch, not of the whole data set."""
    programs, feed = {}, mock.Mock(resident=False)
    resident = trainer(programs).accumulate
    monkeypatch.setattr(update, "make_feed", lambda *_: feed)
    assert trainer(programs).accumulate is not resident and len(programs) == 2


class Unwilling:
    def __hash__(self):
        raise ValueError("no hash")


@pytest.mark.parametrize(
    "more", [nnx.BatchStat(jax.numpy.ones(3)), nnx.Variable(()), bytearray(b"unhashable"), Unwilling()]
)
def test_models_with_more_than_parameters_share_nothing(more):
    """What else they hold is a constant of the program."""
    programs, model = {}, Network(more=more)
    assert structure(model) is None
    assert trainer(programs, lambda: model).accumulate is not trainer(programs, lambda: model).accumulate
    assert programs == {}


def test_training_goes_on_with_what_a_prediction_compiled(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(update, "make_model", lambda *_: Network())
    monkeypatch.setattr("dpnb.training.session.make_model", lambda *_: Network())
    e = tiny.experiment(epsilon=8.0)
    predicted = cost.predict(e, tiny.data(), repeats=1)
    assert len(traced) == 1 and len(predicted.programs) == 1
    run = train(e, tiny.data(), tmp_path / "with", programs=predicted.programs)
    assert len(traced) == 1
    alone = train(e, tiny.data(), tmp_path / "alone")
    assert len(traced) == 2
    jax.tree.map(np.testing.assert_array_equal, run.params, alone.params)


def test_a_program_that_is_handed_on_is_checked_before_anything_is_charged(tmp_path):
    """One that adds twice what it should, under the terms of the right one."""
    programs = {}
    right = trainer(programs, devices=8).accumulate

    def doubled(params, totals, *batch):
        before = jax.tree.map(np.asarray, totals.gradient)
        new = right(params, totals, *batch)
        return new._replace(gradient=jax.tree.map(lambda a, b: 2 * a - b, new.gradient, before))

    (terms,) = programs
    with pytest.raises(UnsoundTrainer, match="clip"):
        train(tiny.experiment(augmult=1), tiny.data(), tmp_path, model=Network(), programs={terms: doubled})
    assert [path.name for path in tmp_path.rglob("*")] == ["ledger.jsonl.lock"]
