"""`dpnb plan`: the formulas, and what takes the place of what."""

import json
import math
import re

import pytest
import shared_runs

from dpnb import cli, experiments
from dpnb.experiments import imagenet
from dpnb.results import plan

WRN = "cifar10/wrn-16-4/eps1"
FLOPS = 2.2e9
VIEWS = 875 * 4096 * 16


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Writes rows as benchmarks/compiled.py does, of WRN-16-4."""

    def write(**rows):
        made = [
            {"experiment": WRN, "preset": "paper", "target": t.replace("_", "-"), **row}
            for t, row in rows.items()
        ]
        (tmp_path / "compiled.json").write_text(json.dumps({"networks": made}))

    monkeypatch.setattr(plan, "COMPILED", tmp_path / "compiled.json")
    return write


def hours(e, records=()):
    return {row.device: row for row in plan.rows(e, plan.work_of(e, FLOPS), list(records))}


def test_views_and_flops():
    e = experiments.get(WRN)
    parameters, flops = plan.flops_of(e)
    assert plan.work_of(e)[:2] == (VIEWS, flops)
    assert parameters == 2_753_818 and 2.0e9 < flops < 2.4e9
    assert plan.flops_of(experiments.get("imagenet/scratch/nf-resnet-50/eps8"))[0] == 25_557_048


def test_what_nobody_compiled_is_counted_in_flop(compiled):
    """The H100 at its own share of the peak takes what was measured: 17.8 us a view."""
    found = hours(experiments.get(WRN))
    assert found["H100"].hours == pytest.approx(VIEWS * 17.8e-6 / 3600)
    assert found["A100"].hours == pytest.approx(found["H100"].hours * 989 / 312)
    assert found["TPU v5e"].hours == pytest.approx(8 * found["TPU v5e-8"].hours)
    assert "GFLOP a view at 12% of the peak" in found["T4"].how and found["T4"].examples is None


def test_a_compiled_program_says_more(compiled):
    compiled(
        t4={"examples": 32, "views": 16, "memory": 10**9, "bytes_per_view": 200_000_000},
        v5e_8={"examples": 8, "views": 16, "memory": 10**9, "cycles_per_view": 60_000},
        a100={"refused": "one call takes 99 GB"},
    )
    found = hours(experiments.get("cifar10/wrn-16-4/eps8", augmult=8))  # another cell of the same network
    views = 2468 * 4096 * 8
    assert found["T4"].hours == pytest.approx(views * 200e6 / 0.32e12 / plan.OF_BANDWIDTH / 3600)
    assert found["TPU v5e"].hours == pytest.approx(views * 60_000 / 1.5e9 / 3600)
    assert found["TPU v5e-8"].hours == pytest.approx(found["TPU v5e"].hours / 8)
    assert (found["T4"].examples, found["T4"].memory) == (32, 10**9) and "200.0 MB a view" in found["T4"].how
    assert math.isnan(found["A100"].hours) and "one call takes 99 GB" in found["A100"].how
    assert "GFLOP" in found["H100"].how
    compiled(t4={"examples": 32, "views": 16, "memory": 10**9, "bytes_per_view": 1000})
    assert "GFLOP" in hours(experiments.get(WRN))["T4"].how  # which takes longer than to move so little


def test_of_several_programs_the_nearest(tmp_path, monkeypatch):
    """Private ones for a private run, and of these the one with about as many views."""
    names = "pretrain/tiny-imagenet32", "cifar10/augmult/k32", "cifar10/wrn-16-4/eps1"
    row = {"preset": "paper", "target": "t4", "views": 1, "memory": 1, "bytes_per_view": 1}
    made = [{**row, "experiment": name, "examples": i} for i, name in enumerate(names)]
    monkeypatch.setattr(plan, "COMPILED", tmp_path / "compiled.json")
    plan.COMPILED.write_text(json.dumps({"networks": made}))
    asked = {"cifar10/augmult/k32": 1, "cifar10/augmult/k8": 2, "pretrain/textures": 0}
    assert {name: hours(experiments.get(name))["T4"].examples for name in asked} == asked


def test_what_was_measured_comes_first(compiled):
    e = experiments.get("cifar10/wrn-16-4/eps8")
    record = shared_runs.record_of("cifar10/wrn-16-4/eps8", "paper")
    fast = {**record, "devices": "1 x NVIDIA H100 80GB HBM3, jax 0.11.2", "seconds": 1000.0}
    slow = {**fast, "seconds": 5000.0}
    others = [
        {**fast, "devices": "8 x NVIDIA H100 80GB HBM3, jax 0.11.2", "seconds": 1.0},
        {**fast, "hyper_parameters": {**fast["hyper_parameters"], "augmult": 4}, "seconds": 1.0},
        {**fast, "hyper_parameters": {**fast["hyper_parameters"], "depth": 40}, "seconds": 1.0},
    ]
    found = hours(e, [slow, fast, *others])
    assert found["H100"].hours == pytest.approx(1000 / 3600) and found["H100"].how.startswith("measured: ")
    assert found["A100"].how.startswith("computed: ")


def test_a_record_without_a_time_is_no_measurement(compiled):
    """Released records of secret runs."""
    name = "cifar10/wrn-16-4/eps8"
    record = shared_runs.record_of(name, "paper") | {
        "devices": "1 x NVIDIA H100, jax 0.11.2",
        "seconds": None,
    }
    assert hours(experiments.get(name), [record])["H100"].how.startswith("computed: ")


def test_features_of_photographs_are_one_pass_forward():
    """All of ImageNet through the network once; what is trained on them is nothing beside that."""
    e = experiments.get("imagenet/finetune/places365-classifier/eps8")
    work = plan.work_of(e)
    assert work.views == 1_281_167 and work.flops == pytest.approx(2 * 4.031e9)
    expected = work.views * work.flops / 989e12 / plan.OF_PEAK / 3600
    assert plan.on("H100", e).hours == pytest.approx(expected) and expected < 0.1


@pytest.mark.parametrize(
    "name", [n for n in experiments.names("[ip][ml]a*/*/*") if experiments.get(n).image_size]
)
def test_flop_of_known_networks_are_those_that_xla_counts(name, traced):
    e = experiments.get(name)
    key = e.network, e.depth, e.image_size
    if key not in traced:
        traced[key] = plan.flops_of(e)[1]
    assert imagenet.FLOPS[key] == pytest.approx(traced[key], rel=0.002)


@pytest.fixture(scope="module")
def traced():
    """FLOP by network, as tracing takes a second."""
    return {}


def test_the_command(compiled, capsys):
    assert cli.main(["plan", WRN, "--set", "steps=10"]) == 0
    said = capsys.readouterr().out
    assert "WRN-16-4, 2,753,818 parameters" in said and "10 updates x 4,096 examples x 16 views" in said
    assert all(device.name in said for device in plan.DEVICES)
    assert cli.main(["plan", "imagenet/finetune/places365-classifier/eps8"]) == 0
    assert "features of 1,281,167 photographs, once, 8.06 GFLOP each forward:" in capsys.readouterr().out


def test_the_hours_of_imagenet_in_the_documents_are_those_of_the_command():
    """From the committed programs; to the last digit that is shown."""
    text = (shared_runs.ROOT / "docs" / "scale.md").read_text()
    shown = dict(re.findall(r"^\| ([\w -]+?)(?: \(80 GB\))? \| [^|]*\| ([\d.,]+ \| [\d.,]+) \|", text, re.M))
    e = experiments.get("imagenet/scratch/nf-resnet-50/eps8")
    rows = plan.rows(e, plan.work_of(e), [])

    def said(hours):
        return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"

    assert shown == {row.device: f"{said(row.hours)} | {said(row.hours / 32)}" for row in rows}


def test_several_devices_share_the_views(compiled, capsys, tmp_path):
    """One H100 takes 0.28 hours for this run (see above), four a quarter of it."""
    for number, hours in (("1", "0.28"), ("4", "0.071")):
        assert cli.main(["plan", WRN, "--devices", number, "--results", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert re.search(rf"^(4 x )?H100 +{hours} ", said, re.M), said
        assert ("4 x TPU v5e-8" in said) == (number == "4") == ("share the views without loss" in said)


@pytest.mark.parametrize("arguments, why", [
    (["cifar10/scatter-linear/eps3"], "trains on features"),
    ([WRN, "--devices", "0"], "must be at least 1, got 0"),
    ([WRN, "--set", "steps=None", "--set", "noise_multiplier=2"], "add --set steps=T"),
])  # fmt: skip
def test_what_cannot_be_planned_says_why(arguments, why, capsys):
    assert cli.main(["plan", *arguments]) == 2
    assert why in capsys.readouterr().err
