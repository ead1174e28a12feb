"""The registry: the paper's table as PAPER recalls it, and dataclasses that refuse nonsense."""

import dataclasses

import pytest

from dpnb import experiments
from dpnb.experiments import PRESETS, Experiment

# "CIFAR-10 without extra data", delta = 1e-5: mean (standard deviation) by epsilon.
TABLE = """
          1          2          3          4          6          8
wrn-16-4  56.8(0.6)  64.9(0.5)  69.2(0.3)  71.9(0.3)  77.0(0.8)  79.5(0.7)
wrn-40-4  56.4(0.6)  65.9(0.5)  70.7(0.2)  73.5(0.6)  78.8(0.4)  81.4(0.2)
"""
HEAD, *ROWS = (line.split() for line in TABLE.strip().splitlines())
CELLS = [(row[0], epsilon, cell) for row in ROWS for epsilon, cell in zip(HEAD, row[1:], strict=True)]


@pytest.mark.parametrize(("network", "epsilon", "cell"), CELLS)
def test_every_cell_of_the_table(network, epsilon, cell):
    e = experiments.get(f"cifar10/{network}/eps{epsilon}")
    assert f"{e.paper_mean}({e.paper_std})" == cell
    assert (e.dataset, f"wrn-{e.depth}-{e.width}", e.epsilon, e.delta) == (
        "cifar10",
        network,
        float(epsilon),
        1e-5,
    )
    assert (e.augmult, e.expected_batch_size, e.clip_norm, e.learning_rate) == (16, 4096, 1.0, 2.0)
    assert (e.noise_multiplier, e.sampler, e.accountant, e.seed) == (None, "poisson", "pld", 0)
    assert e.steps > 0
    verified = (network, epsilon) == ("wrn-40-4", "8")  # in the abstract; the others are recalled
    assert ("unverified" in e.paper_source) == (not verified)


def test_there_are_no_other_cells():
    assert len(CELLS) == 12
    assert experiments.names("cifar10/wrn-*") == [f"cifar10/{n}/eps{eps}" for n, eps, _ in CELLS]


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiments.get("digits/wrn-10-1").steps = 3


def test_unknown_field():
    with pytest.raises(TypeError, match="learning_rat"):
        experiments.get("digits/wrn-10-1", learning_rat=1.0)
    with pytest.raises(TypeError, match="nesterov"):
        Experiment("x").replace(nesterov=True)


BAD = [
    ("epsilon", 0), ("epsilon", -1.0), ("epsilon", float("nan")), ("delta", 0), ("delta", 1),
    ("noise_multiplier", -0.1), ("noise_multiplier", float("inf")), ("steps", 0), ("steps", -5),
    ("expected_batch_size", 0), ("augmult", -1), ("clip_norm", 0), ("clip_norm", -1.0), ("ema_decay", 1.0),
    ("ema_decay", -0.1), ("sampler", "poison"), ("accountant", "gdp"), ("compute_dtype", "float8"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_name_the_field_and_what_came(field, value):
    with pytest.raises(ValueError, match=field) as error:
        experiments.get("digits/wrn-10-1", **{field: value})
    assert repr(value) in str(error.value) and "digits/wrn-10-1" in str(error.value)


def test_only_one_is_calibrated():
    for field in ("noise_multiplier", "steps", "epsilon"):
        Experiment("x", **{"noise_multiplier": 1.0, field: None})
    with pytest.raises(ValueError, match="noise_multiplier.*steps"):
        Experiment("x", steps=None)


def test_unknown_name_suggests():
    with pytest.raises(KeyError, match="cifar10/wrn-16-4/eps8"):
        experiments.get("cifar10/wrn164/eps8")
    with pytest.raises(ValueError, match="smoke.*'tiny'"):
        experiments.get("digits/wrn-10-1", "tiny")


def test_another_data_set_has_no_number_of_the_paper_beside_it():
    e = experiments.get("imagenet/scratch/nf-resnet-50/eps8", dataset="mine")
    assert (e.paper_mean, e.paper_std) == (None, None) and "is on imagenet2012" in e.paper_source
    same = experiments.get("imagenet/scratch/nf-resnet-50/eps8", dataset="imagenet2012")
    assert same.paper_mean == 32.4


@pytest.mark.parametrize("name", experiments.names())
def test_presets_change_the_scale_not_the_promise(name):
    full = experiments.get(name)
    for preset in PRESETS:
        e = experiments.get(name, preset)
        assert e.preset == preset and e.name == name and e.dataset == full.dataset
        for kept in ("epsilon", "delta", "sampler", "clip_norm", "seed", "paper_mean", "paper_source"):
            assert getattr(e, kept) == getattr(full, kept), (preset, kept)
    assert experiments.get(name, "smoke", steps=7).steps == 7  # changes come last


PRESENTATION = {
    "name": "y", "preset": "smoke", "data_note": "n", "paper_mean": 1.0, "paper_std": 1.0, "paper_source": "s",
    "eval_every": 7, "eval_examples": 7, "physical_batch_size": 7,
    "form": "two-pass", "formulation": "sliced", "remat": True, "shard": True, "impossible": "secret weights",
}  # fmt: skip
DECISIVE = {
    "dataset": "digits", "depth": 10, "width": 1, "epsilon": 4.0, "delta": 1e-6, "noise_multiplier": 2.0,
    "steps": 7, "expected_batch_size": 7, "augmult": 7, "clip_norm": 0.5, "learning_rate": 1.0,
    "ema_decay": 0.5, "sampler": "shuffle", "accountant": "rdp", "validation": 7, "compute_dtype": "bfloat16",
    "network": "scatter-linear", "norm": "none", "standardised": False, "relu_first": False, "momentum": 0.9,
    "schedule": "cosine", "pretrained": "somewhere", "trainable": "last-2", "image_size": 224,
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Experiment) if f.name != "seed"])
def test_fingerprint_sees_what_decides_and_only_that(field):
    """The seed is missing on purpose: training derives the effective one from both."""
    base = Experiment("x", augmult=0)
    value = {**PRESENTATION, **DECISIVE}[field]  # a new field has to be put into one of the two
    if field == "trainable":
        base = base.replace(pretrained="somewhere")
    assert getattr(base, field) != value
    same = base.replace(**{field: value}).fingerprint() == base.fingerprint()
    assert same == (field in PRESENTATION)


def test_fingerprint_sees_the_data_and_is_stable():
    base = Experiment("x")
    assert base.fingerprint() == Experiment("x").fingerprint()
    assert len({base.fingerprint(), base.fingerprint(data="a"), base.fingerprint(data="b")}) == 3
    assert base.replace(seed=1).fingerprint() == base.fingerprint()


def test_fields_that_came_later_leave_old_fingerprints_alone():
    """Seeds and checkpoints of runs on record derive from these."""
    known = "5d80be4d58d0b86644d1697e0c16bd8ba1d9e687b7258458869bf96984989097"
    assert experiments.get("cifar10/wrn-16-4/eps8", compute_dtype="float32").fingerprint() == known


@pytest.mark.parametrize("trainable", ["last-0", "last-", "first-1", "none", ""])
def test_what_is_trained_is_all_the_classifier_or_the_last_blocks(trainable):
    with pytest.raises(ValueError, match="trainable must be all, classifier, or last-k"):
        Experiment("x", pretrained="somewhere", trainable=trainable)


def test_frozen_layers_need_pretrained_weights():
    with pytest.raises(ValueError, match="need pretrained weights"):
        Experiment("x", trainable="classifier", augmult=0)
    with pytest.raises(ValueError, match="augmult 0"):
        Experiment("x", trainable="classifier", pretrained="somewhere", augmult=4)
