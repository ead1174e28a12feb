"""Does a record hold?  Its epsilon from its ledger, its accuracy from its weights."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dpnb import data, features, privacy, results
from dpnb.evaluation import make_evaluate
from dpnb.experiments import Experiment
from dpnb.models import functional, pretrained
from dpnb.update import make_model


@dataclasses.dataclass(frozen=True)
class Report:
    """ok: everything that could be checked agrees; complete: nothing had to be left out;
    lines: what was checked, in words."""

    ok: bool
    complete: bool
    lines: list[str]


def verify(directory: str | pathlib.Path, *, data_dir=None, data_file=None) -> Report:
    """Recomputes epsilon and accuracy of `directory/result.json`.

    Args:
      directory: with `result.json` and `ema.safetensors`.
      data_dir, data_file: as for `dpnb.data.load`.
    Raises:
      FileNotFoundError: no such record.
    Without the data set or the weights the ledger of the record alone is checked, and the report says so
    (`dpnb verify` then ends with exit status 3).
    """
    directory = pathlib.Path(directory)
    own = directory / "photographs"  # digits that a notebook wrote as JPEG files
    data_dir = own if data_dir is None and own.is_dir() else data_dir
    r = json.loads((directory / "result.json").read_text())
    checks = []
    for accountant in ("pld", "rdp"):
        said = r["privacy"][f"epsilon_{accountant}"]
        found = results.recompute_epsilon(r["ledger"], r["privacy"]["delta"], accountant)
        agree = found == said or (None not in (found, said) and abs(found - said) <= 1e-3 * said)
        checks.append((agree, f"epsilon ({accountant.upper()}) {said}, from the ledger {found}"))
    p, charged = r["privacy"], privacy.counts_from_json(r["ledger"])
    stated = privacy.Mechanism(p["noise_multiplier"], p["sampling_probability"], p["sampler"])
    # A step that was charged twice is in the ledger twice.
    agree = set(charged) == {stated} and charged[stated] >= p["steps"] and p["epsilon_is"] == stated.claim
    checks.append((agree, f"{p['steps']} steps of {stated}, {p['epsilon_is']}; the ledger has {charged}"))
    hyper = {k: v for k, v in r["hyper_parameters"].items() if v is not None}
    experiment = Experiment(**{**hyper, "epsilon": hyper.get("epsilon", float("inf"))})
    try:
        found = data.load(
            r["data"]["name"],
            data_dir=data_dir,
            file=data_file,
            validation=experiment.validation,
            image_size=experiment.image_size,
        )
        if not (directory / "ema.safetensors").is_file():
            raise FileNotFoundError("this record comes without its weights, ema.safetensors")
        weights = load_file(directory / "ema.safetensors")
        if r.get("pretrained"):
            began = pretrained.used(experiment)["sha256"]
            checks.append((began == r["pretrained"]["sha256"], f"began with the weights {began[:16]}"))
        fingerprint = features.fingerprint(experiment, found)
    except (data.DataError, OSError, KeyError, ValueError) as error:
        return report(checks, f"--   accuracy and data were not checked: {error}")
    recorded = r["data"]["fingerprint"]
    same = fingerprint == recorded
    note = f" (of images with the note: {r['data']['note']})" if r["data"]["note"] and not same else ""
    said = f"data fingerprint {fingerprint[:16]}, recorded {recorded[:16]}"
    found = features.prepare(experiment, found)
    params, apply = functional(make_model(experiment, len(found.classes), 0))
    accuracy = make_evaluate(apply, recipe=found.recipe)(unflatten(weights, params), found.test).accuracy
    close = abs(accuracy - r["accuracy"]["ema"]) <= 100 * 3 / len(found.test)  # ties may fall otherwise
    checks.append((same, said + note))
    said = f"EMA accuracy {r['accuracy']['ema']:.2f} %, from the weights {accuracy:.2f} %"
    checks.append((close, said))
    return report(checks)


def report(checks: list[tuple[bool, str]], left_out: str = "") -> Report:
    """Checks (does it agree, what was compared), and a line on what could not be checked, "" for nothing."""
    lines = [f"{'ok  ' if ok else 'FAIL'} {text}" for ok, text in checks]
    return Report(all(ok for ok, _ in checks), not left_out, lines + [left_out] * bool(left_out))


def unflatten(arrays: dict[str, np.ndarray], like, prefix: str = ""):
    """The inverse of `results.flatten`; shapes must be those of `like`."""
    if isinstance(like, dict):
        return {k: unflatten(arrays, v, f"{prefix}{k}/") for k, v in like.items()}
    name = prefix.rstrip("/")
    if name not in arrays or arrays[name].shape != like.shape:
        got = arrays[name].shape if name in arrays else "nothing"
        raise ValueError(
            f"the weights must hold {name} of shape {like.shape}, got {got}; another architecture?"
        )
    return jnp.asarray(arrays[name], jnp.float32)
