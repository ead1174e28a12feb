"""What an accelerator computes with is chosen by measuring: the logic on timings that are made up, the rest on a CPU."""

import itertools
import json

import jax
import pytest
import shared_runs

from dpnb import results
from dpnb.experiments import Experiment
from dpnb.training import choice, cost, train, update
from dpnb.training.choice import Choice, Timing
from dpnb.training.settings import settings_of

SIZES = (8, 16, 32)  # views a call


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    """CPUs count as accelerators, and the model is linear."""
    monkeypatch.setitem(choice.VIEWS, "cpu", SIZES)
    monkeypatch.setitem(choice.FORMULATIONS, "cpu", ("auto", "sliced", "unrolled"))
    monkeypatch.setattr(update, "make_model", shared_runs.linear)
    monkeypatch.setattr("dpnb.training.session.make_model", shared_runs.linear)


def experiment(**changes):
    fields = {"noise_multiplier": 1.0, "steps": 2, "expected_batch_size": 24, "augmult": 2, "delta": 1e-3}
    return Experiment(
        "bands/choice", **{**fields, "epsilon": 50.0, "accountant": "rdp", "eval_every": 0, **changes}
    )


def measured(monkeypatch, speeds, **changes):
    """The choice for {(examples, formulation): microseconds, None if it does not fit}, and what was tried in order."""
    tried = []

    def time_call(e, data, **terms):
        tried.append((e.physical_batch_size, e.formulation))
        return Timing(*tried[-1], speeds.get(tried[-1], 99.0), 1000)

    monkeypatch.setattr(choice, "time_call", time_call)
    found = choice.measure(
        experiment(**changes), shared_runs.bands(), jax.devices()[:1], say=lambda text: None
    )
    assert [(t.physical_batch_size, t.formulation) for t in found.timings] == tried
    return (found.physical_batch_size, found.formulation), tried


def test_more_examples_as_long_as_that_is_faster(monkeypatch):
    speeds = {(4, "auto"): 10.0, (8, "auto"): 8.0, (16, "auto"): 7.9}  # less than 2 % faster
    best, tried = measured(monkeypatch, speeds)
    assert best == (16, "auto")
    assert tried == [(4, "auto"), (8, "auto"), (16, "auto"), (8, "sliced"), (8, "unrolled")]


def test_the_fastest_of_all_is_chosen(monkeypatch):
    speeds = {(4, "auto"): 10.0, (8, "auto"): 8.0, (16, "auto"): 9.0, (8, "sliced"): 5.0}
    assert measured(monkeypatch, speeds)[0] == (8, "sliced")


def test_what_does_not_fit_is_halved(monkeypatch):
    speeds = {(4, "auto"): None, (2, "auto"): None, (1, "auto"): 20.0, (1, "sliced"): None}
    best, tried = measured(monkeypatch, speeds)
    assert (
        best == (1, "auto")
        and tried[:3] == [(4, "auto"), (2, "auto"), (1, "auto")]
        and (8, "auto") not in tried
    )


def test_not_even_one_example(monkeypatch):
    speeds = dict.fromkeys(itertools.product((4, 2, 1), ("auto",)))
    with pytest.raises(MemoryError, match="1 examples a call must fit the memory of 1 x cpu"):
        measured(monkeypatch, speeds)


def test_what_the_experiment_says_is_not_measured(monkeypatch):
    assert measured(monkeypatch, {}, physical_batch_size=6)[1] == [
        (6, "auto"),
        (6, "sliced"),
        (6, "unrolled"),
    ]
    assert measured(monkeypatch, {}, formulation="sliced")[1] == [(4, "sliced"), (8, "sliced")]
    assert not choice.is_open(experiment(physical_batch_size=6, formulation="sliced"), jax.devices())


def test_unrolled_only_over_few_examples(monkeypatch):
    tried = measured(monkeypatch, {}, physical_batch_size=choice.MANY + 1)[1]
    assert (choice.MANY + 1, "unrolled") not in tried


def test_after_a_minute_no_candidate_is_compiled(monkeypatch):
    monkeypatch.setattr(choice, "SECONDS", -1.0)
    assert measured(monkeypatch, {}) == ((4, "auto"), [(4, "auto")])


def test_a_cpu_has_nothing_to_choose(monkeypatch):
    monkeypatch.delitem(choice.VIEWS, "cpu")
    assert not choice.is_open(experiment(), jax.devices())


def test_a_call_that_does_not_fit_is_not_made(monkeypatch):
    monkeypatch.setattr(choice, "free_memory", lambda device: 1000)
    e, terms = experiment(physical_batch_size=4), dict(seed=0, devices=jax.devices()[:1])
    assert choice.time_call(e, shared_runs.bands(), **terms).microseconds is None
    monkeypatch.setattr(choice, "free_memory", lambda device: 2**30)
    found = choice.time_call(e, shared_runs.bands(), **terms)
    assert 0 < found.microseconds < 1e6 and 1000 < found.memory < 2**30


def test_a_run_keeps_its_choice_and_says_so(monkeypatch, tmp_path):
    """In its folder, in its record, and in the settings under which its noise was drawn; it is measured once."""
    data, devices = shared_runs.bands(), jax.devices()[:1]
    asked = experiment()
    train(asked, data, tmp_path, devices=devices, stop_at_step=1)
    kept = Choice.from_json((tmp_path / choice.FILE).read_text())
    assert {t.physical_batch_size for t in kept.timings} >= {4} and kept.devices.startswith("1 x cpu")
    monkeypatch.setattr(choice, "time_call", lambda *_, **__: pytest.fail("measured again"))
    run = train(asked, data, tmp_path, devices=devices)
    record = results.record(run, data)
    assert record["choice"]["physical_batch_size"] == kept.physical_batch_size and run.steps == 2
    assert json.loads(json.dumps(record["choice"])) == json.loads(kept.to_json())
    assert sum(event["steps"] for event in run.events) == 2  # no step was paid twice
    other = kept.apply(asked).replace(formulation="im2col")
    assert settings_of(kept.apply(asked), data, devices) != settings_of(other, data, devices)


def test_a_choice_of_other_devices_is_not_kept(monkeypatch, tmp_path):
    data, devices = shared_runs.bands(), jax.devices()[:1]
    (tmp_path / choice.FILE).write_text(Choice("8 x other", 3, "sliced", []).to_json())
    monkeypatch.setattr(
        choice, "time_call", lambda e, *_, **__: Timing(e.physical_batch_size, e.formulation, 1.0, 1)
    )
    assert choice.settle(experiment(), data, tmp_path, devices).physical_batch_size != 3
    here = Choice.from_json((tmp_path / choice.FILE).read_text())
    assert choice.settle(experiment(), data, tmp_path, devices) == here
    mine = choice.settle(experiment(physical_batch_size=5), data, tmp_path, devices)
    assert mine.physical_batch_size == 5


def test_a_prediction_hands_its_choice_to_the_run(monkeypatch, tmp_path):
    predicted = cost.predict(experiment(), shared_runs.bands())
    assert predicted.physical_batch_size == predicted.chosen.physical_batch_size
    monkeypatch.setattr(choice, "time_call", lambda *_, **__: pytest.fail("measured again"))
    terms = dict(programs=predicted.programs, chosen=predicted.chosen)
    run = train(experiment(), shared_runs.bands(), tmp_path, stop_at_step=1, **terms)
    assert run.choice["formulation"] == predicted.chosen.formulation
