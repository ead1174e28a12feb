"""Records on disk: saves and loads them, and finds them by experiment or cell."""

import dataclasses
import json
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save as serialised

from dpnb import experiments, privacy
from dpnb.data import Dataset
from dpnb.files import private_folder, write_atomic
from dpnb.results import release
from dpnb.results.consistency import LeftOut, misfit, noisier
from dpnb.results.records import finite, read_record, record, statement

if TYPE_CHECKING:
    from dpnb.training import Run


def save(run: "Run", data: Dataset, directory: str | pathlib.Path) -> dict[str, Any]:
    """Writes `result.json`, its `privacy.md`, and the averaged parameters (`ema.safetensors`, float32).

    They go to `directory` if the data are public. With a secret seed they go to `directory/release`
    (`directory/private` if the run has no privacy claim) without anything exact about the training data, and
    the full record goes to `directory/private/full-result.json`.

    Returns:
      The record as in `result.json`. Process 0 writes it, and the others wait until it has.
    """
    from dpnb.training.hosts import call_on_process_0

    made = record(run, data)
    return call_on_process_0(lambda: _write(made, run, data, directory))


def _write(made: dict[str, Any], run: "Run", data: Dataset, directory: str | pathlib.Path) -> dict[str, Any]:
    from dpnb.training.seeds import run_seed

    e = run.experiment
    private = all(m.has_noise for m in privacy.counts_from_json(run.events))
    folder = release.folder(directory, e.seed is None, private)
    if e.seed is None:
        kept = private_folder(directory, secret=True)
        write_atomic(kept / release.FULL_RECORD, as_json(made), mode=0o600)
        made = release.record(made, run_seed(kept, None)[0])
    saw = f"{data.name}, as {e.name} (fingerprint {made['data']['fingerprint']})"
    if run.public:
        saw += f"; before that {run.public['saw']}"
    write_atomic(folder / "ema.safetensors", serialised(flatten(run.ema_params), {"saw": saw}))
    write_atomic(folder / release.RECORD, as_json(made))
    write_atomic(folder / "privacy.md", statement(made) + "\n")
    return made


def as_json(made: dict[str, Any]) -> str:
    """Formats a record as the text of its file; a number that is not finite raises ValueError."""
    return json.dumps(made, indent=1, allow_nan=False) + "\n"


def flatten(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Flattens nested parameters to {"blocks/0/conv1/kernel": array, ...}."""
    if not isinstance(params, dict):
        return {prefix.rstrip("/"): np.asarray(params)}
    parts = [flatten(v, f"{prefix}{k}/") for k, v in params.items()]
    return {k: v for part in parts for k, v in part.items()}


def load(root: str | pathlib.Path, name: str = release.RECORD) -> list[dict[str, Any]]:
    """Loads all records below a directory, oldest first; `release.FULL_RECORD` names those of secret runs.

    A file that is no record (see `read_record`) is left out with the warning `dpnb.results.consistency.LeftOut`.
    """
    found = []
    for path in sorted(pathlib.Path(root).rglob(name)):
        try:
            found.append(read_record(path))
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", LeftOut, stacklevel=2)
    return sorted(found, key=lambda r: r["finished"])


def matching_records(
    experiment: experiments.Experiment, records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the finished records of this experiment, whatever name and seed it ran under.

    A cell that appears in several tables is trained once. A record matches if all hyper-parameters are equal,
    except those that were calibrated (None in `experiment`); calibrated noise must spend the budget. A record
    that contradicts them (in epsilons, mechanism, ledger, data or accuracies) is left out with the warning
    `dpnb.results.consistency.LeftOut`. Weights are not examined, see `dpnb verify`.
    """
    default = {f.name: f.default for f in dataclasses.fields(experiment)}
    wanted = {k: finite(v) for k, v in experiment.identity_fields().items() if v is not None}

    def same(record):
        hyper = record["hyper_parameters"]
        return all(hyper.get(k, default[k]) == v for k, v in wanted.items())

    def quiet(record):  # has no more noise than is calibrated
        return experiment.noise_multiplier is not None or not noisier(record)

    return [r for r in records if not r["stopped"] and same(r) and _fits(r) and quiet(r)]


def _fits(record: dict[str, Any]) -> bool:
    """Returns whether a record agrees with its hyper-parameters; warns if it does not."""
    if why := misfit(record):
        warn_left_out(record, why)
    return not why


def warn_left_out(record: dict[str, Any], why: str) -> None:
    """Warns (`LeftOut`) that a record is in no table, and says why."""
    which = (
        f"{record['experiment']} [{record['preset']}, seed {record['seed']}, finished {record['finished']}]"
    )
    warnings.warn(f"left out of all tables: the record {which}: {why}", LeftOut, stacklevel=4)


def runs_of_cell(name: str, preset: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records of one cell of a table, one per seed, without runs whose settings were changed."""
    runs = [
        r
        for r in matching_records(experiments.get(name, preset), records)
        if (r["experiment"], r["preset"]) == (name, preset)
    ]
    return one_per_seed(runs)


def one_per_seed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps the last of several records of one published seed; secret seeds all differ, and all are kept."""
    published = {r["seed"]: r for r in runs if r["seed"] is not None}
    return [*published.values(), *(r for r in runs if r["seed"] is None)]
