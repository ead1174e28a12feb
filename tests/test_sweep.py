"""Sweeps: what is planned, skipped, shared between studies, and survived."""

import json
import math
import pathlib
import time

import pandas
import pytest
import shared_runs

from dpnb import experiments, results, sweep, training
from dpnb.experiments import Experiment, studies
from dpnb.training import session, update

TINY = dict(dataset="bands", steps=2, expected_batch_size=24, delta=1e-3, physical_batch_size=8, augmult=0,
            accountant="rdp", eval_every=0)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(update, "make_model", shared_runs.linear)
    monkeypatch.setattr(session, "make_model", shared_runs.linear)


def plan(pattern="cifar10/lr-clip/lr1-*", seeds=2, **changes):
    return sweep.plan(pattern, "smoke", seeds, **{**TINY, **changes})


@pytest.fixture(scope="module")
def swept():
    """Three cells, two seeds, run once; `said` is what it printed, `traced` has one entry for each loss traced."""
    with pytest.MonkeyPatch.context() as patch:
        traced = shared_runs.count_traces(patch)
        patch.setattr(update, "make_model", shared_runs.linear)
        patch.setattr(session, "make_model", shared_runs.linear)
        root, said = shared_runs.temporary("sweep"), []
        return root, sweep.run(plan(), shared_runs.bands(), root, said.append), said, traced


def test_plan():
    todo = plan()
    assert [(e.clip_norm, e.seed) for e in todo] == [(c, s) for s in (0, 1) for c in (0.1, 1.0, 10.0)]
    with pytest.raises(KeyError, match="no experiment matches"):
        plan("cifar10/lr-clap/*")
    with pytest.raises(ValueError, match="seeds"):
        plan(seeds=0)


def test_a_sweep_takes_seeds_and_refuses_a_seed():
    """It was passed over in silence, and the seeds 0 ... were run."""
    for asked in (plan, lambda **changes: sweep.on_record("cifar10/lr-clip/*", "smoke", [], **changes)):
        with pytest.raises(
            ValueError, match="changes of a sweep must leave seed alone, got 5; it is `seeds`"
        ):
            asked(seed=5)


def test_cells_that_are_one_experiment_run_once():
    """At epsilon 8 and the paper's scale K = 16 is the whole recipe, in five studies."""
    whole = ["augmult/k16", "batch/b4096", "depth-width/w4", "lr-clip/lr2-c1", "ablation/5-ema"]
    cells = {experiments.get(f"cifar10/{name}").fingerprint() for name in whole}
    assert cells == {experiments.get("cifar10/wrn-16-4/eps8").fingerprint()}
    assert (
        len(sweep.plan("cifar10/depth-width/*", "paper"))
        == len(experiments.names("cifar10/depth-width/*")) - 1
    )


def test_records_and_prediction(swept):
    root, made, said, _ = swept
    assert not made.failures and len(made.records) == 6
    assert "6 cells, 0 of them finished" in said[0] and "compiling" in said[1] and "of updates on" in said[2]
    budgets = [line for line in said if "sigma" in line]
    assert len(budgets) == 6 and all(
        "N 96, q" in b and "epsilon" in b and "materialised" in b for b in budgets
    )
    for e in plan():
        r = json.loads((sweep.directory(root, e) / "result.json").read_text())
        assert (r["experiment"], r["seed"], r["privacy"]["steps"]) == (e.name, e.seed, 2)


def test_a_prediction_and_runs_of_all_seeds_share_programs(swept):
    """Three clip norms are three programs."""
    assert len(swept[3]) == 3


def test_a_changed_experiment_has_its_own_directory():
    """So that a sweep with other hyper-parameters neither collides with the registry's nor is it taken for it."""
    (known,) = sweep.plan("cifar10/augmult/k1", "teach")
    (changed,) = sweep.plan("cifar10/augmult/k1", "teach", learning_rate=1.0)
    assert sweep.directory("x", known) == pathlib.Path("x/cifar10/augmult/k1/teach-seed0")
    places = {
        sweep.directory("x", e) for e in (known, changed, changed.replace(seed=1), known.replace(seed=1))
    }
    assert len(places) == 4
    name = "teach-secret-learning_rate=1.0"
    assert sweep.directory("x", changed.replace(seed=None)).name == name


def test_a_summary_marks_cells_that_are_one_experiment():
    """At preset teach more than eight views are eight: the table shows that run once."""
    frame = results.summary(sweep.cells("cifar10/augmult/*", "teach"), [])
    assert list(frame["cell"][~frame["first"]]) == ["k16", "k32"]
    assert "k8" in results.study(frame) and "k16" not in results.study(frame)
    everywhere = sweep.scales("cifar10/augmult/k1", "teach", steps=3)
    assert {scale: at[0].steps for scale, at in everywhere.items()} == {
        scale: 3 if scale == "teach" else experiments.get("cifar10/augmult/k1", scale).steps
        for scale in experiments.PRESETS
    }


def test_finished_cells_are_skipped(swept, monkeypatch):
    """Also those that another study ran under another name; no other seed, data or setting counts."""
    root, made, *_ = swept
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("trained again"))
    said = []
    again = sweep.run(plan(), shared_runs.bands(), root, said.append)
    assert again.records == made.records and len(said) == 1
    e = plan()[1].replace(name="cifar10/elsewhere/x", noise_multiplier=None)
    records = results.load(root)
    assert sweep.finished(e, shared_runs.bands(), records)["experiment"] == plan()[1].name
    for other in (e.replace(seed=7), e.replace(learning_rate=3.0), e.replace(epsilon=4.0)):
        assert sweep.finished(other, shared_runs.bands(), records) is None
    records = [{**r, "data": {**r["data"], "fingerprint": "other"}} for r in records]
    assert sweep.finished(e, shared_runs.bands(), records) is None


@pytest.mark.slow
def test_a_failure_is_listed_and_not_fatal(tmp_path, monkeypatch):
    train = training.train

    def sometimes(e, *rest, **more):
        if e.clip_norm == 0.1:
            raise RuntimeError("out of memory")
        return train(e, *rest, **more)

    monkeypatch.setattr(training, "train", sometimes)
    said = []
    made = sweep.run(plan(seeds=1), shared_runs.bands(), tmp_path, said.append)
    assert len(made.records) == 2 and list(made.failures.values()) == ["RuntimeError: out of memory"]
    assert said[-1] == "failed: cifar10/lr-clip/lr1-c0.1, seed 0: RuntimeError: out of memory"
    assert "out of memory" in next(tmp_path.rglob("failure.txt")).read_text()
    monkeypatch.setattr(training, "train", train)
    assert not sweep.run(plan(seeds=1), shared_runs.bands(), tmp_path, said.append).failures


def test_what_does_not_fit_the_time_is_left_to_the_next_sweep(tmp_path):
    """The first run stops after an update, the second is not begun; then both are finished, as one sweep would have."""
    todo, said = plan("cifar10/lr-clip/lr1-c1", 2), []
    made = sweep.run(todo, shared_runs.bands(), tmp_path, said.append, deadline=time.monotonic() + 0.001)
    assert [r["stopped"][:15] for r in made.records] == ["stopped in time"] and not made.failures
    assert any(line.startswith("stopped in time before cifar10/lr-clip/lr1-c1, seed 1") for line in said)
    made = sweep.run(todo, shared_runs.bands(), tmp_path, said.append)
    assert [(r["stopped"], r["seed"]) for r in made.records] == [("", 0), ("", 1)]
    assert [sum(event["steps"] for event in r["ledger"]) for r in made.records] == [2, 2]


def test_an_interrupt_is_not_a_failure(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(plan(seeds=1), shared_runs.bands(), tmp_path, lambda _: None)


def test_summary(swept):
    _, made, *_ = swept
    cells = plan(seeds=1)
    frame = results.summary(cells, made.records, ("clip_norm",))
    assert list(frame["cell"]) == ["lr1-c0.1", "lr1-c1", "lr1-c10"] and set(frame["n"]) == {2}
    assert list(frame["clip_norm"]) == [0.1, 1.0, 10.0]
    assert {(row["B"], row["T"], row["K"]) for _, row in frame.iterrows()} == {(24, 2, 0)}  # as it ran
    accuracies = [[r["accuracy"]["ema"] for r in results.matching_records(e, made.records)] for e in cells]
    for (_, row), (a, b) in zip(frame.iterrows(), accuracies, strict=True):
        assert row["ema"] == pytest.approx((a + b) / 2) and row["ema_std"] == pytest.approx(
            abs(a - b) / math.sqrt(2)
        )
    text = results.study(frame)
    assert "| cell | network | B | T | K | clip_norm | epsilon |" in text and "| 24 | 2 | 0 | 0.1 |" in text
    assert "Images of these runs: made up." in text  # the note of their data, once
    absent = cells[0].replace(epsilon=1.0)
    assert results.summary([absent], made.records)["n"][0] == 0


def test_what_is_on_record(monkeypatch):
    """The scales that have runs; presets that are one experiment are one scale, also in name."""
    frames = {}

    def summary(cells, records, fields):
        frames[cells[0].preset] = cells
        return pandas.DataFrame({"n": [len(records)] * len(cells)})

    monkeypatch.setattr(results, "summary", summary)
    found = sweep.on_record("cifar10/scatter-linear/eps3", "smoke", [{}])
    assert list(found) == ["smoke", "teach = colab = paper"]
    assert list(sweep.on_record("cifar10/augmult/*", "teach", [{}])) == ["teach", "smoke", "colab", "paper"]
    assert sweep.on_record("cifar10/augmult/*", "teach", []) == {}


def test_a_scale_that_only_repeats_runs_is_not_shown_again(monkeypatch):
    """The classifier alone is one experiment at teach and colab; all layers, without a run, are two."""

    def summary(cells, records, fields):
        return pandas.DataFrame({"n": [int(e.trainable == "classifier") for e in cells]})

    monkeypatch.setattr(results, "summary", summary)
    shown = list(sweep.on_record("cifar10/finetune/[ac]*/eps1", "teach", [{}]))
    assert shown == ["teach", "smoke", "paper"]


@pytest.mark.parametrize("preset", experiments.PRESETS)
def test_a_study_changes_what_it_studies(preset):
    """At every preset the cells of a study differ in the field that gives it its name, in that order."""

    def values(pattern, field):
        return [getattr(experiments.get(name, preset), field) for name in experiments.names(pattern)]

    for pattern, field in (("cifar10/batch/b*", "expected_batch_size"), ("cifar10/batch/t[0-9]*", "steps")):
        assert values(pattern, field) == sorted(set(values(pattern, field)))
    views = values("cifar10/augmult/*", "augmult")
    assert views == sorted(views) and views[:3] == [0, 1, 2]
    tan = [experiments.get(name, preset) for name in experiments.names("cifar10/batch/tan-*")]
    assert len({round(e.expected_batch_size / e.noise_multiplier, 6) for e in tan}) == 1
    assert len({(e.learning_rate, e.clip_norm) for e in plan("cifar10/lr-clip/*", 1)}) == 15


def test_the_ladder_adds_one_technique_at_a_time():
    cells = [experiments.get(f"cifar10/ablation/{i}-{name}") for i, (name, _) in enumerate(studies._LADDER)]
    changed = [
        {k for k, v in a.identity_fields().items() if v != b.identity_fields()[k]}
        for a, b in zip(cells, cells[1:], strict=False)
    ]
    assert changed == [{"norm"}, {"expected_batch_size"}, {"standardised"}, {"augmult"}, {"ema_decay"}]
    none, clip = (experiments.get(f"cifar10/ablation/private-{x}") for x in ("none", "clip"))
    assert (
        math.isinf(none.clip_norm)
        and none.noise_multiplier == clip.noise_multiplier == 0
        and clip.clip_norm == 1
    )
    assert isinstance(none, Experiment) and math.isinf(none.epsilon)
