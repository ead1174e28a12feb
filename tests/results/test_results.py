"""Records describe themselves, hide the secret seed, and can be checked from their own files."""

import copy
import json
import math
import shutil

import numpy as np
import pandas
import pytest
import shared_runs
from safetensors.numpy import load_file, save_file

from dpnb import data, experiments, privacy, results
from dpnb.results import consistency, provenance, verification


@pytest.fixture(scope="module")
def tiny():
    return shared_runs.tiny()


@pytest.fixture
def verify(tiny, tmp_path, monkeypatch):
    """`verify(change)`: the report on a copy of the record after `change(directory, record)`; `owner`: with private/."""
    monkeypatch.setattr(verification, "make_model", shared_runs.linear)

    def verify(change=lambda directory, record: None, file=tiny.file, owner=True):
        copied = tmp_path / "record"
        shutil.copytree(tiny.out, copied)
        released = copied / "release"
        record = json.loads((released / "result.json").read_text())
        change(released, record)
        (released / "result.json").write_text(json.dumps(record))
        return verification.verify(copied if owner else shutil.move(released, tmp_path / "x"), data_file=file)

    return verify


def failed(report):
    return [line for line in report.lines if line.startswith("FAIL")]


def test_round_trip_through_strict_json(tiny):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for name, record in (("release/result.json", tiny.released), ("private/full-result.json", tiny.result)):
        assert json.loads((tiny.out / name).read_text(), parse_constant=refuse) == record
    assert not list(tiny.out.rglob("*.partial"))


def test_every_item_is_there(tiny):
    r, p, run = tiny.result, tiny.result["privacy"], tiny.run
    assert 5 < p["epsilon_pld"] < p["epsilon_rdp"] <= 8  # PLD is tight, RDP an upper bound on it
    assert p["epsilon_rdp"] > 7.9
    assert (p["delta"], p["sampling_probability"], p["steps"], p["epsilon_target"]) == (1e-3, 0.5, 6, 8.0)
    assert p["noise_multiplier"] == run.experiment.noise_multiplier > 0
    assert (p["sampler"], p["epsilon_is"], p["calibrated_with"]) == ("poisson", "valid", "rdp")
    assert p["neighbours"] == privacy.NEIGHBOURS and p["seed_published"] is False
    assert (r["experiment"], r["preset"], r["augmult"], r["clip_norm"]) == ("bands/tiny", "smoke", 0, 1.0)
    assert r["seed"] is None and r["stopped"] == ""
    assert r["accuracy"] == {"raw": run.raw.accuracy, "ema": run.ema.accuracy}
    assert r["loss"] == {"raw": run.raw.loss, "ema": run.ema.loss}
    assert r["evaluated_on"] == "60 test images"
    bands = shared_runs.bands()
    assert r["data"] == {
        "name": "bands", "training_examples": 96, "fingerprint": bands.fingerprint, "note": "made up",
    }  # fmt: skip
    assert (
        set(provenance.PACKAGES) | {"python"} <= set(r["versions"])
        and "not installed" not in r["versions"].values()
    )
    assert r["devices"].startswith("1 x ") and "CPU cores" in r["machine"]
    assert 0 < r["seconds"] < 1000 and r["finished"][:2] == "20"
    assert isinstance(r["git_revision"], str)
    assert [point["step"] for point in r["curve"]] == [3, 6]
    for point in r["curve"]:
        assert {"epsilon", "train_loss", "raw_accuracy", "ema_accuracy", "clipped_fraction"} <= set(point)
    assert sum(event["steps"] for event in r["ledger"]) == 6
    assert r["hyper_parameters"]["learning_rate"] == 1.0 and r["hyper_parameters"]["steps"] == 6


def test_the_run_learnt_something(tiny):
    assert tiny.result["accuracy"]["ema"] > 60, "a third is chance; the checks of accuracy need more"


def test_secret_seed_is_in_no_output(tiny):
    """The file that resuming needs has it, readable by its owner only; records, ledger and weights do not."""
    secret = tiny.out / "private" / "seed.secret"
    assert secret.stat().st_mode & 0o077 == 0
    seeds = [json.loads(secret.read_text())["seed"], *tiny.secrets]
    assert len(seeds) > 2 and min(seeds) > 1000
    texts = [text for seed in seeds for text in (str(seed), f"{seed:x}")]
    others = [p for p in tiny.out.rglob("*") if p.is_file() and p != secret]
    assert {"result.json", "ledger.jsonl", "ema.safetensors"} <= {p.name for p in others}
    shown = [results.row(tiny.result).encode(), results.statement(tiny.result).encode()]
    published = [
        p.read_bytes() for p in others if "checkpoints" not in p.parts
    ]  # those hold the key to resume
    for content in shown + published:
        assert not any(text.encode() in content for text in texts)


def test_published_seed_is_in_the_record_and_said_aloud(tiny):
    r = copy.deepcopy(tiny.result)
    r["seed"], r["privacy"]["seed_published"] = 7, True
    assert "seed 7" in results.row(r) and "seed is published" in results.statement(r)
    assert "seed must stay secret" in results.statement(tiny.result)


@pytest.mark.slow
def test_statement_and_row_state_epsilon_with_its_terms(tiny):
    for text in (results.statement(tiny.result), results.row(tiny.result)):
        for term in ("PLD", "RDP", "sigma", "q ", "delta", "poisson", "valid", privacy.NEIGHBOURS):
            assert term in text, term
    assert "made up" in results.statement(tiny.result)
    assert (tiny.out / "release" / "privacy.md").read_text() == results.statement(tiny.released) + "\n"
    public = {"weights": "wrn", "sha256": "0", "saw": "ImageNet at 32x32"}
    assert "pre-trained on ImageNet at 32x32" in results.statement({**tiny.result, "pretrained": public})


def test_shuffled_runs_are_nominal(tiny):
    run = copy.copy(tiny.run)
    events = [{**event, "sampler": "shuffle"} for event in run.events]
    object.__setattr__(run, "experiment", run.experiment.replace(sampler="shuffle"))
    object.__setattr__(run, "events", events)
    r = results.record(run, shared_runs.bands())
    assert r["privacy"]["epsilon_is"] == "nominal" and "nominal epsilon" in results.row(r)
    assert "*nominal*" in results.statement(r)


def test_infinite_epsilon_is_null(tiny):
    run = copy.copy(tiny.run)
    free = run.experiment.replace(epsilon=math.inf, noise_multiplier=0.0, clip_norm=math.inf)
    object.__setattr__(run, "experiment", free)
    object.__setattr__(run, "events", [{**event, "noise_multiplier": 0.0} for event in run.events])
    object.__setattr__(run, "history", [{**point, "epsilon": math.inf} for point in run.history])
    r = results.record(run, shared_runs.bands())
    json.dumps(r, allow_nan=False)
    assert r["privacy"]["epsilon_pld"] is None and r["privacy"]["epsilon_target"] is None
    assert "infinite" in results.row(r)


def test_flatten_is_inverted(tiny):
    flat = results.flatten(tiny.run.ema_params)
    assert set(flat) == {"layer/kernel", "layer/bias"}
    again = verification.unflatten(flat, tiny.run.ema_params)
    np.testing.assert_array_equal(again["layer"]["kernel"], flat["layer/kernel"])
    with pytest.raises(ValueError, match=r"layer/bias of shape \(3,\), got nothing"):
        verification.unflatten({"layer/kernel": flat["layer/kernel"]}, tiny.run.ema_params)


def test_an_honest_record_passes(verify):
    report = verify()
    assert report.ok and report.complete and not failed(report), report.lines


def test_who_lacks_the_secret_cannot_check_the_data(verify):
    report = verify(owner=False)
    assert report.ok and not report.complete and not failed(report)
    (line,) = [line for line in report.lines if line.startswith("--")]
    assert "keyed with the run's secret seed" in line
    assert any(line.startswith("ok   EMA accuracy") for line in report.lines)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_tampered_epsilon(verify, accountant):
    def change(directory, record):
        record["privacy"][f"epsilon_{accountant}"] *= 0.99

    report = verify(change)
    assert not report.ok and [accountant.upper() in line for line in failed(report)] == [True]


def test_tampered_ledger(verify):
    def change(directory, record):
        record["ledger"][0]["steps"] -= 1

    report = verify(change)
    assert not report.ok and len(failed(report)) == 4  # two epsilons, the record's ledger, and the file's


def test_tampered_weights(verify):
    def change(directory, record):
        weights = load_file(directory / "ema.safetensors")
        weights["layer/kernel"] = -weights["layer/kernel"]
        save_file(weights, directory / "ema.safetensors")

    report = verify(change)
    assert not report.ok and [line.split()[1:3] for line in failed(report)] == [
        ["EMA", "accuracy"],
        ["EMA", "loss"],
    ]


def test_tampered_accuracy(verify):
    def change(directory, record):
        record["accuracy"]["ema"] -= 10.0

    report = verify(change)
    assert not report.ok and len(failed(report)) == 2  # the curve says so too
    assert all("accuracy" in line for line in failed(report))


def test_tampered_data(verify, tmp_path):
    bands = shared_runs.bands()
    images = bands.train.images.copy()
    images[0, 0, 0, 0] ^= 1  # one pixel of one training image
    data.save(data.Dataset("bands", data.Split(images, bands.train.labels), bands.test, bands.classes),
              tmp_path / "other.npz")  # fmt: skip
    report = verify(file=tmp_path / "other.npz")
    assert not report.ok and ["data fingerprint" in line for line in failed(report)] == [True]


def made(name, preset, accuracy, seed=0, changes=(), **more):
    """A record of that cell; `changes` to its hyper-parameters make it another experiment."""
    return {**shared_runs.record_of(name, preset, accuracy, seed, **dict(changes)), **more}


CELL = "cifar10/wrn-40-4/eps8"


def row(frame, preset):
    rows = frame[(frame["experiment"] == CELL) & (frame["preset"] == preset)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_table_of_nothing_is_runnable():
    frame = results.table("cifar10/wrn-*", [])
    assert list(frame["experiment"]) == experiments.names("cifar10/wrn-*")
    assert set(frame["status"]) == {"runnable"} and set(frame["ours"]) == {"-"}
    flagged = frame["paper"].str.contains("unverified")
    assert list(frame["experiment"][~flagged]) == [CELL]
    assert row(frame, "paper")["paper"] == "81.4 +- 0.2"


@pytest.mark.slow
def test_table_mean_spread_and_difference():
    full = [made(CELL, "paper", 80.0 + seed, seed, seconds=120.0) for seed in range(3)]
    stopped = made(CELL, "paper", 1.0, stopped="killed")
    frame = results.table("cifar10/wrn-*", [*full, stopped, made(CELL, "smoke", 40.0)])
    paper, smoke = row(frame, "paper"), row(frame, "smoke")
    assert (paper["ours"], paper["n"], paper["difference"]) == ("81.0 +- 1.0", 3, "-0.4")
    assert (paper["minutes"], paper["status"]) == ("2.0", "reproduced")
    assert (smoke["ours"], smoke["n"], smoke["difference"]) == ("40.0", 1, "-")  # another experiment
    assert smoke["status"] == "run at smaller scale"
    assert len(frame) == 1 + len(experiments.names("cifar10/wrn-*"))


def test_full_scale_status_is_not_always_reproduced():
    """A point below the published mean still counts (re-runs spread as much), more does not."""
    falls, just = made(CELL, "paper", 80.3), made(CELL, "paper", 80.5)
    e = experiments.get(CELL)
    assert row(results.table(CELL, [just]), "paper")["status"] == "reproduced"
    assert results.status(e, [just]) == "reproduced (n = 1)"
    assert row(results.table(CELL, [falls]), "paper")["status"] == "run, falls short"
    assert results.status(e, [falls]) == "run, falls short (n = 1)"
    other = "cifar10/scatter-linear/eps1"
    unknown = made(other, "paper", 60.0)
    assert list(results.table(other, [unknown])["status"]) == ["run, nothing published"]


def test_a_changed_run_is_not_in_the_table():
    """Another depth or budget is another experiment, whatever its name; a physical batch is not."""
    changed = [
        made(CELL, "paper", 99.0, changes={"depth": 16}),
        made(CELL, "paper", 99.0, changes={"epsilon": 9.0}),
        made(CELL, "paper", 99.0, changes={"noise_multiplier": 2.5}),  # more than calibration gives
    ]
    frame = results.table(CELL, changed)
    assert (
        list(frame["status"]) == ["runnable"] and results.status(experiments.get(CELL), changed) == "runnable"
    )
    same = made(CELL, "paper", 80.0, changes={"physical_batch_size": 7})
    assert row(results.table(CELL, [*changed, same]), "paper")["ours"] == "80.0"


def test_one_seed_counts_once():
    """The same run, recorded in two directories; secret seeds are all different."""
    twice = [made(CELL, "paper", 80.0, seconds=60.0), made(CELL, "paper", 80.0, seconds=60.0)]
    assert row(results.table(CELL, twice), "paper")["n"] == 1
    secret = [
        made(CELL, "paper", 80.0, None, seconds=60.0),
        made(CELL, "paper", 81.0, None, seconds=60.0),
    ]
    assert row(results.table(CELL, [*twice, *secret]), "paper")["n"] == 3


def test_no_row_is_nominal():
    """All rows are of Poisson sampling: a run that shuffled is another experiment, and said not to be in it."""
    shuffled = made(CELL, "paper", 80.0, changes={"sampler": "shuffle"})
    assert shuffled["privacy"]["epsilon_is"] == "nominal"
    with pytest.warns(consistency.LeftOut, match=r"sampler shuffle \(registry: poisson\)"):
        assert row(results.table(CELL, [shuffled]), "paper")["status"] == "runnable"


def test_markdown():
    lines = results.markdown(results.table(CELL, [made(CELL, "paper", 80.0)])).splitlines()
    assert "| 80.0 | 1 | -1.4 |" in lines[2]  # a count is not 1.0
    assert len(lines) == 3 and {line.count("|") for line in lines} == {11} and set(lines[1]) <= set("| -")


def test_load_finds_records_oldest_first(tiny, tmp_path):
    for name, finished in (("b/x", "2030-01-02"), ("a/y", "2030-01-03"), ("c", "2030-01-01")):
        (tmp_path / name).mkdir(parents=True)
        text = json.dumps({**tiny.result, "experiment": name, "finished": finished})
        (tmp_path / name / "result.json").write_text(text)
    assert [r["experiment"] for r in results.load(tmp_path)] == ["c", "b/x", "a/y"]
    assert results.load(tmp_path / "nothing here") == []


def three_cells(**columns):
    """A `summary` of three cells: 40 +- 2 over 4 seeds, 37 +- 1.5 over 9, and one run of 50."""
    known = dict(
        cell=["with", "without", "once"], network=["WRN-10-1"] * 3, B=[128, 512, 1024], T=[77] * 3, K=[0, 1, 2],
        epsilon=[8.0, math.inf, math.nan], ema=[40.0, 37.0, 50.0], ema_std=[2.0, 1.5, math.nan], n=[4, 9, 1],
        first=[True, True, True], note=["some are copies", "some are copies", ""],
    )  # fmt: skip
    return pandas.DataFrame({**known, **columns})


def test_difference_of_means():
    """sqrt(2^2 / 4 + 1.5^2 / 9) = sqrt(1.25); one run has no standard error, no run no mean."""
    d = results.difference(three_cells(), "with", "without")
    assert (d.mean, d.n, d.n_other) == (3.0, 4, 9) and d.error == pytest.approx(1.118034)
    alone = results.difference(three_cells(), "once", "with")
    assert alone.mean == 10.0 and math.isnan(alone.error) and (alone.n, alone.n_other) == (1, 4)
    absent = three_cells(n=[4, 0, 1], ema=[40.0, math.nan, 50.0], ema_std=[2.0, math.nan, math.nan])
    assert math.isnan(results.difference(absent, "with", "without").mean)
    pairs = [("a", "with", "without"), ("b", "once", "with"), ("c", "once", "not a cell")]
    table = results.tidy(results.differences(three_cells(), pairs), 1)
    assert results.markdown(table).splitlines()[2:] == [
        "| a | 3.0 | 1.1 | 4 | 9 |",
        "| b | 10.0 | - | 1 | 4 |",
    ]
    assert list(results.differences(absent, pairs)["what"]) == ["b"]


def test_difference_from_records():
    """All seeds of both cells count, not only those that both have: 80, 82 against 70, 71, 75."""
    names = "cifar10/wrn-16-4/eps8", "cifar10/wrn-40-4/eps8"
    runs = [
        made(name, "paper", accuracy, seed)
        for name, found in zip(names, ({0: 80.0, 1: 82.0}, {1: 70.0, 2: 71.0, 3: 75.0}), strict=True)
        for seed, accuracy in found.items()
    ]
    cells = [experiments.get(name).replace(name=f"x/{i}") for i, name in enumerate(names)]
    d = results.difference(results.summary(cells, runs), "0", "1")
    assert d.mean == pytest.approx(9.0) and (d.n, d.n_other) == (2, 3)
    assert d.error == pytest.approx(math.sqrt(2 / 2 + 7 / 3))  # variances 2 and 7


def test_scale_and_counts_in_words():
    assert results.scale(three_cells()) == "WRN-10-1, B 128 to 1,024, T 77, K 0 to 2"
    assert results.scale(three_cells()[:1]) == "WRN-10-1, B 128, T 77, K 0"
    assert (results.counts(three_cells()), results.counts(three_cells()[1:2])) == ("n = 4, 9, 1", "n = 9")


def test_study_says_inf_and_what_the_images_are():
    lines = results.study(three_cells()).splitlines()
    assert [line.split(" | ")[5] for line in lines[2:5]] == ["8.0", "inf", "-"]
    assert "note" not in lines[0] and lines[5:] == [
        "", "Epsilon inf: no noise, or (sigma below 0.1) too little to be accounted.", "", "Images of these runs: some are copies.",
    ]  # fmt: skip
    assert "inf" not in results.study(three_cells(epsilon=[8.0, 8.0, 8.0], note=["", "", ""]))


def test_epsilon_spent(tiny):
    """Infinite only for a run that is not private: noise below 0.1 counts as none."""
    r = copy.deepcopy(tiny.result)
    assert results.spent(r) == r["privacy"]["epsilon_pld"]
    r["privacy"].update(epsilon_pld=None, noise_multiplier=0.09)
    assert results.spent(r) == math.inf
    r["privacy"].update(noise_multiplier=1.0)
    assert math.isnan(results.spent(r))  # nobody computed it


@pytest.mark.slow
def test_series_of_accuracy_against_epsilon():
    runs = [made("cifar10/scatter-linear/eps3", "paper", 66.0 + s, s) for s in range(3)]
    runs += [made("cifar10/scatter-linear/eps1", "paper", 59.0)]
    runs += [made("cifar10/wrn-16-4/eps8", "teach", 53.0)]
    runs += [made("cifar10/wrn-16-4/eps8", "teach", 99.0, 1, {"learning_rate": 9.0})]  # not in it
    series = results.series(runs)
    ours = {label: points for label, points in series.items() if label.startswith("ours")}
    assert ours == {
        "ours: scatter-linear (B 8,192, T 366, K 0), n = 1, 3": [(1.0, 59.0, None), (3.0, 67.0, 1.0)],
        "ours: WRN-16-4 at preset teach (WRN-10-1, B 1,000, T 500, K 0), n = 1": [(8.0, 53.0, None)],
    }
    assert series["paper, WRN-40-4 (unverified but for epsilon 8)"][-1] == (8.0, 81.4, 0.2)
    assert len(series["paper, WRN-16-4 (unverified)"]) == 6
    assert len(series["earlier: ScatterNet + CNN (Tramer & Boneh 2021), re-run"]) == 4


def test_our_records_are_in_that_figure():
    series = results.series(results.load(shared_runs.ROOT / "results"))
    (label,) = [label for label in series if label.startswith("ours: scatter-linear")]
    assert {1.0, 3.0} <= {epsilon for epsilon, _, _ in series[label]}
