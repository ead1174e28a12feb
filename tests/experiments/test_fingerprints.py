"""Fingerprints never change: by them a run is continued, and a cell that stands in several tables is trained once."""

import dataclasses
import json
import pathlib

import pytest

from dpnb import experiments
from dpnb.experiments import GROUPS, Experiment, describe_fields, experiment, field_names

# {name: {preset: first 16 digits}} of all experiments at the end of version 0.1.0, but for compute_dtype, which has been
# "auto" in presets colab and paper since; no run of these was on record.
KNOWN = json.loads((pathlib.Path(__file__).parent / "fingerprints.json").read_text())


@pytest.mark.parametrize("preset", experiments.PRESETS)
def test_registered_experiments_are_what_they_were(preset):
    """An experiment that was added since has no line here; one that was changed on purpose needs a new name."""
    assert len(KNOWN) == 142
    got = {name: experiments.get(name, preset).fingerprint()[:16] for name in KNOWN}
    assert got == {name: known[preset] for name, known in KNOWN.items()}


@dataclasses.dataclass(frozen=True)
class Later(Experiment):
    """As a contributor adds a field: with the next number."""

    nesterov: bool = experiment._field("learning", "of SGD", False, since=99)


@dataclasses.dataclass(frozen=True)
class Forgotten(Experiment):
    nesterov: bool = experiment._field("learning", "of SGD", False)


@dataclasses.dataclass(frozen=True)
class Shown(Experiment):
    colour: str = experiment._field("run", "of the curve", "blue")


def test_a_later_field_at_its_default_changes_no_fingerprint():
    before = Experiment("x").fingerprint()
    assert Later("x").fingerprint() == before != Later("x", nesterov=True).fingerprint()
    assert Forgotten("x").fingerprint() != before  # what the list above would notice
    assert Shown("x", colour="red").fingerprint() == before


def test_every_field_says_what_it_is():
    named = [name for group in GROUPS for name in field_names(group)]
    assert sorted(named) == sorted(f.name for f in dataclasses.fields(Experiment))
    text = describe_fields()
    for f in dataclasses.fields(Experiment):
        assert f.metadata["about"] and f"  {f.name}" in text and f.name in Experiment.__doc__
    later = {f.name for f in dataclasses.fields(Experiment) if f.metadata["since"]}
    assert later == {"schedule", "pretrained", "trainable", "image_size", "formulation"}
    assert {"seed", "eval_every", "remat", "paper_mean", "name"}.isdisjoint(Experiment("x").identity_fields())
