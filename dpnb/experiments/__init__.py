"""The registry: one frozen `Experiment` per table cell, and four scales to run it at."""

import difflib
import fnmatch

from dpnb.experiments import cifar10, digits, finetuning, imagenet, pretraining, studies
from dpnb.experiments.changes import FIELDS, read_changes, unknown
from dpnb.experiments.experiment import GROUPS, PRESETS, Experiment, describe_fields, field_names

__all__ = [
    "GROUPS",
    "PRESETS",
    "Experiment",
    "describe_fields",
    "field_names",
    "get",
    "names",
    "read_changes",
]

_FAMILIES = (cifar10, studies, pretraining, finetuning, imagenet, digits)
# The changes that a preset makes to an experiment, by the module that registers it.
_PRESET_OVERRIDES = {e.name: family.preset_overrides for family in _FAMILIES for e in family.TABLE}
_ALL = {e.name: e for family in _FAMILIES for e in family.TABLE}


def names(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, in the order of the tables."""
    return fnmatch.filter(_ALL, pattern)


def get(name: str, preset: str = "paper", **changes) -> Experiment:
    """The experiment of that name at that scale.

    Args:
      name: one of `names()`.
      preset: smoke | teach | colab | paper.
      changes: fields to set on top, e.g. `seed=1`; on another data set no number of the paper is beside it.
    Raises:
      KeyError: unknown name. ValueError: unknown preset or bad value. TypeError: unknown field.

    >>> get("cifar10/wrn-16-4/eps8").steps
    2468
    """
    if name not in _ALL:
        close = difflib.get_close_matches(name, _ALL, 3, 0.3)
        raise KeyError(f"no experiment {name!r}; did you mean {' or '.join(close) or 'one of `dpnb list`'}?")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {PRESETS}, got {preset!r}")
    e = _ALL[name]
    for key in changes:
        if key not in FIELDS:
            raise TypeError(unknown(key))
    made = e.on(changes.get("dataset", e.dataset))
    made = made.replace(**{"preset": preset, **_PRESET_OVERRIDES[name](e, preset), **changes})
    for_accelerators = preset in ("colab", "paper") and not (made.on_features or name.startswith("digits/"))
    if for_accelerators and "compute_dtype" not in changes:
        made = made.replace(compute_dtype="auto")
    return made
