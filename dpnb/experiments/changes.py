"""Changes to an experiment, as a user gives them: names that there are, in a form that can be read."""

import ast
import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from dpnb.experiments.experiment import Experiment

FIELDS = {f.name: f.type for f in dataclasses.fields(Experiment)}
# Fields that notebooks have a parameter of their own for.
PARAMETERS = {name: f"the parameter `{name}`" for name in ("preset", "seed", "data_note")} | {
    "name": "the parameter `experiment` or `pattern`"
}


def unknown(key: Any) -> str:
    """Says that there is no such hyper-parameter, which is close, and which there are."""
    close = difflib.get_close_matches(str(key), FIELDS, 2)
    hint = f"did you mean {' or '.join(close)}?" if close else "none is close"
    return f"no hyper-parameter {key!r}; {hint} (all: {', '.join(FIELDS)})"


def read_changes(given: Any) -> dict[str, Any]:
    """Returns the parameter `changes` of a notebook, {hyper-parameter: value}; `Experiment` checks the values.

    Args:
      given: a mapping, or the text of one in JSON or Python, as `papermill -p changes TEXT` passes it.
    Raises:
      ValueError: it is none, a name is unknown, or a field has a parameter of its own.

    >>> read_changes({"steps": 3}), read_changes('{"steps": 3, "clip_norm": 0.5}'), read_changes("")
    ({'steps': 3}, {'steps': 3, 'clip_norm': 0.5}, {})
    """
    made = _literal(given) if isinstance(given, str) else given
    if not isinstance(made, Mapping):
        raise ValueError(f'changes must be a dictionary such as {{"steps": 300}}, got {given!r}')
    for key, value in made.items():
        if key not in FIELDS:
            raise ValueError(unknown(key))
        if key in PARAMETERS:
            raise ValueError(f"changes must leave {key} alone, got {value!r}; it is {PARAMETERS[key]}")
    return dict(made)


def _literal(text: str) -> Any:
    if not text.strip():
        return {}
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
