"""A run ends in time and goes on in the next sitting, on a clock that is made up."""

import itertools
import types

import jax
import numpy as np
import pytest
import shared_runs

from dpnb.experiments import Experiment
from dpnb.training import pace, train, update


class Clock:
    """A clock that moves by so much at each look."""

    def __init__(self, monkeypatch, seconds: float):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=self.look))

    def look(self) -> float:
        self.now += self.seconds
        return self.now


def updates(found) -> int:
    return next(i for i in itertools.count() if found.is_over())


def test_it_stops_before_the_update_that_does_not_fit(monkeypatch):
    """Updates of 10 s, seen at 20, 30 ...: at 70 another one, the end and the margin fit before 100, at 80 they do not."""
    Clock(monkeypatch, 10.0)
    assert 70 + 10 + 7 + pace.MARGIN <= 100 < 80 + 10 + 7 + pace.MARGIN
    assert updates(pace.Pace(100.0, ending=7.0)) == 6


def test_the_first_update_is_compilation(monkeypatch):
    clock = Clock(monkeypatch, 0.0)
    found = pace.Pace(1000.0)
    for now in (0.0, 400.0, 401.0, 402.0):
        clock.now = now
        assert not found.is_over()
    assert found.longest == 1.0
    alone = pace.Pace(1000.0)
    assert not alone.is_over()
    clock.now += 500.0  # one update, and nothing better is known
    assert alone.is_over()


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_positive(minutes):
    assert pace.deadline(None) is None
    with pytest.raises(ValueError, match="minutes must be a positive number"):
        pace.deadline(minutes)


def test_at_least_one_update_a_sitting(monkeypatch):
    Clock(monkeypatch, 10.0)
    assert updates(pace.Pace(0.5)) == 1
    Clock(monkeypatch, 1e9)
    forever = pace.Pace(None)
    assert not any(forever.is_over() for _ in range(5))


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(update, "make_model", shared_runs.linear)
    monkeypatch.setattr("dpnb.training.session.make_model", shared_runs.linear)


def test_sittings_make_the_run_that_one_would_have_made(linear, monkeypatch, tmp_path):
    """To the bit, and no step is paid twice."""
    fields = dict(noise_multiplier=1.0, steps=4, expected_batch_size=24, augmult=0, delta=1e-3, epsilon=50.0)
    e = Experiment("bands/pace", dataset="bands", **fields, accountant="rdp", eval_every=0)
    whole = train(e, shared_runs.bands(), tmp_path / "whole")
    Clock(monkeypatch, 10.0)
    sittings = [train(e, shared_runs.bands(), tmp_path / "parts", deadline=1.0)]
    while sittings[-1].stopped:
        assert "goes on from there" in sittings[-1].stopped
        sittings.append(train(e, shared_runs.bands(), tmp_path / "parts", deadline=1.0))
    assert [run.steps for run in sittings] == [1, 2, 3, 4]
    assert sum(event["steps"] for event in sittings[-1].events) == 4
    jax.tree.map(np.testing.assert_array_equal, whole.params, sittings[-1].params)
