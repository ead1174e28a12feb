"""Every field of an experiment has a type and bounds, and keeps equal numbers in one form."""

import dataclasses
import math
import pathlib
import typing

import numpy as np
import pytest

from dpnb import experiments, training
from dpnb.experiments import Experiment
from dpnb.experiments.values import Range, canonical
from dpnb.models import nf_resnet, registry

BASE = experiments.get("digits/wrn-10-1", "smoke")
FIELDS = {f.name: f for f in dataclasses.fields(Experiment)}
TYPES = {name: typing.get_args(f.type) or (f.type,) for name, f in FIELDS.items()}
WHOLE = [name for name, types in TYPES.items() if int in types and float not in types]
NUMBERS = [name for name, types in TYPES.items() if {int, float} & {*types}]
TEXTS = [name for name, types in TYPES.items() if str in types]
FLAGS = [name for name, types in TYPES.items() if bool in types]


def same(a, b) -> bool:
    return type(a) is type(b) and a == b


def test_every_field_has_a_type_and_every_number_has_bounds():
    assert sorted(NUMBERS + TEXTS + FLAGS) == sorted(FIELDS)
    assert all(isinstance(FIELDS[name].metadata["allowed"], Range) for name in NUMBERS)
    assert {name for name in FIELDS if type(None) in TYPES[name]} == {
        "epsilon", "noise_multiplier", "steps", "seed", "physical_batch_size", "paper_mean", "paper_std",
    }  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_are_printed_short_and_exact(name):
    allowed = FIELDS[name].metadata["allowed"]
    low, high = str(allowed).removesuffix(" or inf")[1:-1].split(", ")
    assert (float(low), float(high)) == (allowed.low, allowed.high) and len(high) <= len("2147483647")


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name):
    """Also as 1e3, 16.0 or a NumPy scalar, but nothing between them, no text and no truth value."""
    good = 16 if name == "depth" else 8 if name == "augmult" else 32
    for came in (good, float(good), np.int64(good), np.float32(good), np.uint8(good)):
        assert same(getattr(BASE.replace(**{name: came}), name), good)
    for bad in (
        good + 0.5,
        0.5,
        3.5,
        -1,
        -1.0,
        math.inf,
        math.nan,
        str(good),
        True,
        np.True_,
        [good],
        2**31 + 0.0,
    ):
        if (name, bad) != ("seed", 2**31):
            with pytest.raises(ValueError, match=f"^digits/wrn-10-1: {name} must be a whole number in .*got"):
                BASE.replace(**{name: bad})


def test_the_fields_that_failed_late():
    """Each was accepted, or failed after an update was charged."""
    for name, bad in {
        "physical_batch_size": (3.5, 0, -1), "augmult": (2.5, -1), "expected_batch_size": (16.5, 0),
        "eval_examples": (0, -5), "eval_every": (-1, 0.5), "validation": (-1, 0.5), "image_size": (-1, 0.5),
        "steps": (0, 1.5), "depth": (0.5, -1), "seed": (-1, 0.5),
    }.items():  # fmt: skip
        for value in bad:
            with pytest.raises(ValueError, match=f"{name} must be"):
                BASE.replace(**{name: value})


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in WHOLE])
def test_other_numbers(name):
    good = {"width": 1, "delta": 1e-4, "momentum": 0.5, "ema_decay": 0.5}.get(name, 2)
    kept = getattr(BASE.replace(**{name: good}), name)
    for came in (good, float(good), np.float64(good)):
        assert same(getattr(BASE.replace(**{name: came}), name), kept)
    for bad in (math.nan, -math.inf, -0.5, "1", "nan", True, 1e300, 10**400, 1j, [1.0], np.ones(1)):
        with pytest.raises(ValueError, match=f"^digits/wrn-10-1: {name} must be a number in .*got"):
            BASE.replace(**{name: bad})


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name):
    for bad in (None, 3, True, b"text", ["text"]):
        with pytest.raises(ValueError, match=f"{name} must be (text|one of .*), got"):
            BASE.replace(**{name: bad})


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    assert same(getattr(BASE.replace(**{name: np.True_}), name), True)
    for bad in (0, 1, "True", "no", None, 1.0):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got"):
            BASE.replace(**{name: bad})


def test_none_only_where_a_field_allows_it():
    for name in FIELDS:
        if type(None) in TYPES[name]:
            experiment = BASE.replace(**{"noise_multiplier": 1.0, name: None})
            assert getattr(experiment, name) is None
        else:
            with pytest.raises(ValueError, match=rf"{name} must be .*, got None"):
                BASE.replace(**{name: None})
    with pytest.raises(ValueError, match='pretrained must be text, got None; "" for none'):
        BASE.replace(pretrained=None)


def test_equal_numbers_are_one_experiment():
    """Their fingerprints, by which a run goes on, are those of the form that the registry has."""
    for name in NUMBERS:
        value = getattr(BASE, name)
        if value is not None:
            for came in {float(value), np.float64(value)} | ({int(value)} if value == int(value) else set()):
                changed = BASE.replace(**{name: came})
                assert repr(changed) == repr(BASE) and changed.fingerprint() == BASE.fingerprint()
    assert (
        BASE.replace(learning_rate=3, width=2.0).fingerprint()
        == BASE.replace(learning_rate=3.0, width=2).fingerprint()
    )
    assert same(BASE.replace(pretrained=pathlib.Path("a/b")).pretrained, "a/b")


@pytest.mark.parametrize("name", experiments.names())
def test_registered_experiments_keep_their_values_as_they_are(name):
    """So that no fingerprint moves, and every bound leaves room for them."""
    for preset in experiments.PRESETS:
        e = experiments.get(name, preset)
        assert all(
            same(canonical(v, FIELDS[k].type, FIELDS[k].metadata["allowed"]), v) for k, v in vars(e).items()
        )


def test_depth_and_width_are_those_of_the_network():
    for changes, why in (
        (dict(depth=12), "depth of wrn must be one of 10, 16, 22, 28, 34, 40 ..., got 12"),
        (dict(depth=4), "depth of wrn"),
        (dict(width=0.5), "width of wrn must be at least 1, got 0.5"),
        (dict(width=1.5), "width of wrn must be a whole number, got 1.5"),
        (
            dict(network="nf-resnet", depth=10),
            "depth of nf-resnet must be one of 14, 26, 50, 101, 152, 200, got 10",
        ),
        (
            dict(network="nf-resnet", depth=14, width=0.01),
            "width of nf-resnet must be at least 0.015625, got 0.01",
        ),
        (dict(network="nfnet-f0", width=0.05), "width of nfnet-f0 must be at least 0.0625, got 0.05"),
    ):
        with pytest.raises(ValueError) as error:
            BASE.replace(**changes)
        assert why in str(error.value)
    assert BASE.replace(network="nfnet-f3", depth=0).depth == 0  # it has one depth only
    assert registry.NETWORKS["nf-resnet"].depths == tuple(nf_resnet.DEPTHS)


def test_long_seeds_are_kept_to_the_last_digit():
    assert BASE.replace(seed=2**256 - 1).seed == 2**256 - 1


def test_an_enormous_value_is_not_printed_in_full():
    for value in ("x" * 10_000, 10**10_000, [0] * 10_000):
        with pytest.raises(ValueError, match="steps must be") as error:
            BASE.replace(steps=value)
        assert len(str(error.value)) < 400


def test_a_calibrated_experiment_has_its_values_in_their_forms():
    made = training.calibrate(BASE.replace(steps=4.0, accountant="rdp"), 1500)
    assert same(made.steps, 4) and type(made.noise_multiplier) is float
