"""What an accelerator computes with is chosen by measuring: the logic on timings that are made up, the rest on a CPU."""

import dataclasses
import itertools
import json
import warnings

import jax
import pytest
import shared_runs

from dpnb import results
from dpnb.experiments import Experiment
from dpnb.results import release
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
        "bands/choice",
        **{"dataset": "bands", **fields, "epsilon": 50.0, "accountant": "rdp", "eval_every": 0, **changes},
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
    with pytest.raises(MemoryError, match="1 examples a call must be possible on 1 x cpu"):
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


def test_a_size_that_was_asked_for_may_take_all_of_the_memory(monkeypatch):
    monkeypatch.setattr(choice, "free_memory", lambda device: 1000)
    data, devices = shared_runs.bands(), jax.devices()[:1]
    found = choice.measure(
        experiment(physical_batch_size=4, formulation="auto"), data, devices, say=lambda text: None
    )
    assert found.physical_batch_size == 4 and all(t.microseconds for t in found.timings)
    with pytest.raises(MemoryError):
        choice.measure(experiment(), data, devices, say=lambda text: None)


def test_a_run_keeps_its_choice_and_says_so(monkeypatch, tmp_path):
    """In its folder, in its record, and in the settings under which its noise was drawn; it is measured once."""
    data, devices = shared_runs.bands(), jax.devices()[:1]
    asked = experiment()
    train(asked, data, tmp_path, devices=devices, stop_at_step=1)
    kept = Choice.read((tmp_path / choice.FILE).read_text())
    assert {t.physical_batch_size for t in kept.timings} >= {4} and kept.devices.startswith("1 x cpu")
    monkeypatch.setattr(choice, "time_call", lambda *_, **__: pytest.fail("measured again"))
    other = dataclasses.replace(kept, physical_batch_size=kept.physical_batch_size + 1)
    run = train(asked, data, tmp_path, devices=devices, chosen=other)  # the one that was kept comes first
    record = results.record(run, data)
    assert record["choices"] == [kept.as_dict()] == [json.loads(kept.to_json())] and run.steps == 2
    assert sum(event["steps"] for event in run.events) == 2  # no step was paid twice
    elsewhere = kept.apply(asked).replace(formulation="im2col")
    assert settings_of(kept.apply(asked), data, devices) != settings_of(elsewhere, data, devices)


def test_a_record_has_every_choice_and_a_released_one_no_timings(monkeypatch, tmp_path):
    data, asked = shared_runs.bands(), experiment()
    train(asked, data, tmp_path, stop_at_step=1)
    first = Choice.read((tmp_path / choice.FILE).read_text())
    size = first.physical_batch_size + 1
    run = train(asked.replace(physical_batch_size=size), data, tmp_path)
    assert [c["physical_batch_size"] for c in run.choices] == [first.physical_batch_size, size]
    released = release.record(results.record(run, data), seed=0)["choices"]
    assert [set(c) for c in released] == [
        {"devices", "program", "run", "physical_batch_size", "formulation"}
    ] * 2


@pytest.fixture
def quick(monkeypatch):
    """Timings that are made up."""
    monkeypatch.setattr(
        choice, "time_call", lambda e, *_, **__: Timing(e.physical_batch_size, e.formulation, 1.0, 1)
    )


def test_a_choice_of_other_devices_or_of_another_program_is_not_kept(quick, tmp_path):
    data, devices = shared_runs.bands(), jax.devices()[:1]
    program = choice.program_of(experiment(), devices)
    (tmp_path / choice.FILE).write_text(
        Choice("8 x other", program, experiment().fingerprint(), 3, "sliced", []).to_json()
    )
    assert choice.settle(experiment(), data, tmp_path, devices).physical_batch_size != 3
    here = Choice.read((tmp_path / choice.FILE).read_text())
    assert choice.settle(experiment(), data, tmp_path, devices) == here
    assert choice.settle(experiment(remat=True), data, tmp_path, devices).program != here.program
    assert choice.settle(experiment(physical_batch_size=5), data, tmp_path, devices).physical_batch_size == 5


def test_a_run_that_is_refused_leaves_the_choice_alone(quick, tmp_path):
    data = shared_runs.bands()
    train(experiment(), data, tmp_path, stop_at_step=1)
    before = (tmp_path / choice.FILE).read_text()
    with pytest.raises(ValueError, match="of this very experiment"):
        train(experiment(learning_rate=9.0, physical_batch_size=7), data, tmp_path)
    assert (tmp_path / choice.FILE).read_text() == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"timings": 3}', '{"devices": "x", "more": 1, "timings": []}']
)
def test_a_damaged_file_is_measured_again(text, quick, tmp_path):
    (tmp_path / choice.FILE).write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choice.settle(experiment(), shared_runs.bands(), tmp_path, jax.devices()[:1])
    assert Choice.read((tmp_path / choice.FILE).read_text()) is not None
    assert [choice.FILE in str(w.message) for w in said] == ([True] if text else [])


def test_what_a_device_refuses_is_a_candidate_less(monkeypatch):
    def refuse(compiled):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such convolution\nmore")

    monkeypatch.setattr(choice, "memory_of", refuse)
    e = experiment(physical_batch_size=4)
    found = choice.time_call(e, shared_runs.bands(), seed=0, devices=jax.devices()[:1])
    assert found.microseconds is None and str(found).endswith("auto: UNIMPLEMENTED: no such convolution")


def test_cells_of_a_sweep_share_a_choice(quick, monkeypatch, tmp_path):
    """They differ in what does not decide about the program; each folder says whose it is."""
    data, devices = shared_runs.bands(), jax.devices()[:1]
    first = choice.settle(experiment(), data, tmp_path, devices)
    monkeypatch.setattr(choice, "time_call", lambda *_, **__: pytest.fail("measured again"))
    other = experiment(learning_rate=9.0)
    (tmp_path / "other").mkdir()
    second = choice.settle(other, data, tmp_path / "other", devices, first)
    assert second == dataclasses.replace(first, run=other.fingerprint())


def test_a_prediction_hands_its_choice_to_the_run(monkeypatch, tmp_path):
    """Once for all sittings, if it knows the folder."""
    predicted = cost.predict(experiment(), shared_runs.bands(), directory=tmp_path)
    assert predicted.physical_batch_size == predicted.chosen.physical_batch_size
    monkeypatch.setattr(choice, "time_call", lambda *_, **__: pytest.fail("measured again"))
    terms = dict(programs=predicted.programs, chosen=predicted.chosen)
    run = train(experiment(), shared_runs.bands(), tmp_path, stop_at_step=1, **terms)
    assert [c["formulation"] for c in run.choices] == [predicted.chosen.formulation]
    assert cost.predict(experiment(), shared_runs.bands(), directory=tmp_path).chosen == predicted.chosen
