"""Makes records of runs, from which the experiment can be rebuilt and its epsilons recomputed."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpnb import privacy
from dpnb.data import Dataset
from dpnb.privacy import privacy_statement
from dpnb.results.provenance import git_revision, peak_memory_mib, versions

if TYPE_CHECKING:  # reading records needs no JAX
    from dpnb.training import Run


LARGEST = 2**256  # of whole numbers: a seed
_NUMBER = (int, float, type(None))
# What every record has, a released one included, by the types of its values.
SHAPE = {
    "experiment": str, "preset": str, "finished": str, "augmult": int, "clip_norm": _NUMBER, "seed": (int, type(None)),
    "privacy": {"noise_multiplier": (int, float), "sampling_probability": (int, float), "sampler": str, "steps": int,
                "delta": (int, float), "epsilon_target": _NUMBER, "epsilon_is": str, "neighbours": str,
                "calibrated_with": str, "seed_published": bool},
    "accuracy": {"raw": (int, float), "ema": (int, float)}, "loss": {"raw": _NUMBER, "ema": _NUMBER},
    "evaluated_on": str, "data": {"name": str, "training_examples": int, "fingerprint": str, "note": str},
    "paper": {"mean": _NUMBER, "std": _NUMBER, "source": str}, "seconds": _NUMBER, "devices": str, "stopped": str,
    "hyper_parameters": dict, "curve": list, "ledger": list,
}  # fmt: skip


def read_record(path: pathlib.Path, shape: Mapping[str, Any] = SHAPE) -> dict[str, Any]:
    """Reads the file of a record; what it says is not checked, only that it says something.

    Args:
      path: of the file.
      shape: types of values by their names; {} for any JSON object.

    Raises:
      ValueError: it is empty, damaged, or another kind of file.
      OSError: it cannot be read.
    """
    try:
        made = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a record in JSON, but cannot be read ({error})") from None
    if wrong := _misshapen(made, shape):
        raise ValueError(f"{path} must be a record as `results.save` writes it, but {wrong}")
    return made


def _misshapen(value: Any, shape: Any, name: str = "it") -> str:
    """Says what of a value has another type than `shape` wants, "" if nothing."""
    if not isinstance(shape, dict):
        if not isinstance(value, shape):
            return f"{name} is {type(value).__name__}"
        huge = isinstance(value, int) and abs(value) > LARGEST
        return f"{name} is larger than any number in a record" if huge else ""
    if not isinstance(value, dict):
        return f"{name} is {type(value).__name__}"
    missing = next((f"{key} is missing" for key in shape if key not in value), "")
    return missing or next((w for key in shape if (w := _misshapen(value[key], shape[key], key))), "")


def record(run: "Run", data: Dataset) -> dict[str, Any]:
    """Describes one run in plain JSON values, from which alone `recompute_epsilon` can check its privacy.

    Epsilons are recomputed from the ledger, under each accountant, at the experiment's delta; they are
    None if infinite, or if the accountant is not installed (recompute later). A secret seed (`seed=None`)
    is not in the record, but hashes and exact statistics of the training data are: only
    `release.record` of it may be published.
    """
    e, mechanism = run.experiment, run.experiment.mechanism(len(data.train))
    return {
        "experiment": e.name,
        "preset": e.preset,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "privacy": {
            **{f"epsilon_{a}": recompute_epsilon(run.events, e.delta, a) for a in privacy.ACCOUNTANTS},
            "epsilon_target": finite(e.epsilon),
            "epsilon_is": mechanism.claim,
            "delta": e.delta,
            "noise_multiplier": e.noise_multiplier,
            "sampling_probability": mechanism.sampling_probability,
            "steps": run.steps,
            "sampler": e.sampler,
            "neighbours": privacy.NEIGHBOURS,
            "calibrated_with": e.accountant,
            "seed_published": e.seed is not None,
            "exact_noise": bool(e.noise_multiplier),  # see `privacy_statement`; older records do not have it
        },
        "augmult": e.augmult,
        "clip_norm": finite(e.clip_norm),
        "seed": e.seed,
        "accuracy": {"raw": run.raw.accuracy, "ema": run.ema.accuracy},
        "loss": {"raw": finite(run.raw.loss), "ema": finite(run.ema.loss)},
        "evaluated_on": f"{len(data.test)} {'held-out training' if e.validation else 'test'} images",
        "data": {
            "name": data.name,
            "training_examples": len(data.train),
            "fingerprint": data.fingerprint,
            "note": data.note,
        },
        "pretrained": run.public,
        "paper": {"mean": e.paper_mean, "std": e.paper_std, "source": e.paper_source},
        "seconds": run.seconds,
        "devices": run.devices,
        "computed_in": run.computed_in,  # older records do not have these three
        "evaluated_in": run.evaluated_in,
        "choices": run.choices,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "peak_memory_mib": peak_memory_mib(),
        "versions": {"python": platform.python_version(), **versions()},
        "git_revision": git_revision(),
        "stopped": run.stopped,
        "hyper_parameters": {k: finite(v) for k, v in dataclasses.asdict(e).items()},
        "curve": [{k: finite(v) for k, v in point.items()} for point in run.history],
        "ledger": run.events,
    }


def statement(result: dict[str, Any]) -> str:
    """Returns the privacy statement of a record, in prose."""
    public = result.get("pretrained")
    return privacy_statement(
        result["ledger"],
        delta=result["privacy"]["delta"],
        seed_published=result["privacy"]["seed_published"],
        data_note=result["data"]["note"],
        pretrained=public["saw"] if public else "",
        training_examples=result["data"]["training_examples"],
        exact_noise=result["privacy"].get("exact_noise", False),
    )


def recompute_epsilon(events: list[dict[str, Any]], delta: float, accountant: str) -> float | None:
    """Returns the epsilon of a ledger.

    It is None if infinite or unknown: dp-accounting is not installed, or delta is too small for PLD.
    """
    try:
        return finite(privacy.epsilon(privacy.events_from_json(events), 1, delta, accountant))
    except (privacy.MissingAccountant, privacy.DeltaTooSmall):
        return None


def finite(x: Any) -> Any:
    """Returns x, or None for a float that is not finite, which JSON cannot hold."""
    return None if isinstance(x, float) and not math.isfinite(x) else x
