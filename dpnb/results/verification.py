"""Verifies a record against its files, the registry, the data and its weights; says what stays unproven."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dpnb import cache, data, folders
from dpnb.data import Recipe
from dpnb.data.augment import plain
from dpnb.data.dataset import padded_batches
from dpnb.experiments import Experiment
from dpnb.models import functional, weights
from dpnb.models.precision import resolve
from dpnb.models.registry import make_model
from dpnb.results import release
from dpnb.results.consistency import MALFORMED, Check, consistency, evaluated, experiment_of
from dpnb.results.records import read_record
from dpnb.training import features
from dpnb.training.evaluation import even_batch_size
from dpnb.training.seeds import initial_rngs, run_seed

LIMITS = (
    "note no check can show that these weights came from these steps, of this mechanism under these settings: "
    "whoever wrote the record says so, as of the raw loss, seconds, devices and versions"
)
# Rounding may decide if the true class wins or loses by less than this share of the largest logit.
TIE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2}
MOST_TIES = 0.01  # of all images: a network that gives all classes the same logit is not excused


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `verify`.

    ok: everything that could be checked agrees.
    complete: nothing had to be left out.
    lines: what was checked ("ok", "FAIL", or "--" for what could not be), with `LIMITS` at the end.
    """

    ok: bool
    complete: bool
    lines: list[str]


@cache.unused()  # what is verified is computed
def verify(directory: str | pathlib.Path, *, data_dir=None, data_file=None) -> Report:
    """Rebuilds what `directory/result.json` says from hyper-parameters, data and weights, and compares.

    The privacy block and the ledger are compared with the mechanism, epsilons with the ledger, both with the
    ledger file and the metadata of the weights if these exist, the settings with the registry, and EMA
    accuracy and loss with the weights. Accuracies agree if they differ by no more images than there are
    near-ties, which another machine may decide differently. There are no weights for the raw accuracy; it is
    compared with the curve, as far as that goes. That these weights came from these steps cannot be shown.
    Without the data set or the weights only the record is checked, and the report says so (`dpnb verify` then
    exits with status 3).

    Args:
      directory: holds `result.json` and `ema.safetensors`; for a run with a secret seed it is `release/`, or
        the folder around it. The data of such a run are checked if `private/` is beside it.
      data_dir, data_file: `data_dir` and `file` of `dpnb.data.load`.
    Raises:
      FileNotFoundError: there is no such record.
      ValueError: it is empty, damaged, or another kind of file.
    """
    directory, private = places(pathlib.Path(directory))
    record = read_record(directory / release.RECORD, {})  # what it lacks is reported
    checks = consistency(record, directory)
    if folders.is_installed(directory):
        checks.append(
            (None, "a wheel leaves out ema.safetensors; the weights on record are in the repository")
        )
    try:
        experiment, recorded = experiment_of(record), record["data"]["fingerprint"]
        name, note = record["data"]["name"], record["data"]["note"]
    except MALFORMED:  # `consistency` has reported it
        return report(
            [*checks, (None, "accuracy and data were not checked: the record does not say of what")]
        )
    own = private / "photographs"  # digits that a notebook wrote as JPEG files
    try:
        found = data.load(
            name,
            data_dir=own if data_dir is None and own.is_dir() else data_dir,
            file=data_file,
            validation=experiment.validation,
            image_size=experiment.image_size,
        )
        if began := weights.provenance(experiment.pretrained):
            said = (record.get("pretrained") or {}).get("sha256")
            checks.append((began["sha256"] == said, f"began with the weights {began['sha256'][:16]}"))
        fingerprint = features.fingerprint(experiment, found)
    except (data.DataError, OSError, KeyError, ValueError) as error:
        return report([*checks, (None, f"accuracy and data were not checked: {error}")])
    checks.append(_sizes(record, found))
    checks.append(_fingerprint(fingerprint, recorded, private, note))
    try:
        checks += _accuracy(record, experiment, found, directory / "ema.safetensors")
    except FileNotFoundError:
        checks.append(
            (None, "accuracy was not checked: this record comes without its weights, ema.safetensors")
        )
    except (OSError, ValueError, SafetensorError) as error:
        checks.append((False, f"weights: {error}"))
    return report(checks)


def places(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the folder of the record and that of the run's private files (the same if all is public)."""
    for secret in ("release", "private"):
        if not (directory / release.RECORD).is_file() and (directory / secret / release.RECORD).is_file():
            directory = directory / secret
    return directory, directory.parent / "private" if directory.name == "release" else directory


def _sizes(record: dict[str, Any], found: data.Dataset) -> Check:
    said = record["data"]["training_examples"], evaluated(record)
    got = len(found.train), len(found.test)
    return (
        said == got,
        f"data: {said[0]} training and {said[1]} evaluation images, loaded {got[0]} and {got[1]}",
    )


def _fingerprint(fingerprint: str, recorded: str, private: pathlib.Path, note: str) -> Check:
    """Compares fingerprints; that of a secret run is keyed, and can be recomputed only with its seed."""
    if recorded.startswith("keyed "):
        if not (private / "seed.secret").is_file():
            return (
                None,
                "data: the fingerprint is keyed with the run's secret seed, only its owner can check it",
            )
        fingerprint = release.keyed(fingerprint, run_seed(private, None)[0])
    same = fingerprint == recorded
    note = f" (of images with the note: {note})" if note and not same else ""
    return same, f"data fingerprint {fingerprint[:16]}, recorded {recorded[:16]}{note}"


def _accuracy(record, experiment: Experiment, found: data.Dataset, file: pathlib.Path) -> list[Check]:
    arrays = load_file(file)
    test = features.prepare_test(experiment, found)
    ran = experiment.replace(compute_dtype=resolve(record.get("evaluated_in", experiment.compute_dtype)))
    params, apply = functional(make_model(ran, len(found.classes), initial_rngs(0)))
    tie, batch_size = TIE[ran.compute_dtype], even_batch_size(len(test))
    m = measure(apply, unflatten(arrays, params), test, found.recipe, tie, batch_size)
    n, ema, loss = len(test), record["accuracy"]["ema"], record["loss"]["ema"]
    within = max(1, min(m.ties, int(MOST_TIES * n)))
    text = f"EMA accuracy {ema:.2f} %, from the weights {100 * m.right / n:.2f} % of {n} images"
    text += f" (within {within}: near-ties)"
    return [
        (abs(ema * n / 100 - m.right) <= within + 1e-6 * n, text),
        (
            _same_loss(loss, m.loss),
            f"EMA loss {loss}, from the weights {m.loss:.6g} (within one in a hundred)",
        ),
    ]


def _same_loss(said: float | None, found: float) -> bool:
    """Compares two losses; what is not finite is null in JSON."""
    if said is None or not np.isfinite(found):
        return said is None and not np.isfinite(found)
    return abs(said - found) <= 0.01 * found + 1e-4


class Measured(NamedTuple):
    """Numbers of images classified correctly and of near-ties, decided by rounding; mean loss in nats."""

    right: int
    ties: int
    loss: float


def measure(apply: Callable, params, split, recipe: Recipe, tie: float, batch_size: int = 250) -> Measured:
    """Evaluates like `dpnb.training.evaluation.make_evaluate`, and counts near-ties.

    Args:
      apply: `(params, inputs float [batch, ...]) -> logits [batch, classes]`.
      split, recipe, batch_size: as for `make_evaluate`.
      tie: a near-tie is an image whose true class wins or loses by less than this share of its largest logit.
    """

    @jax.jit
    def forward(params, images, labels):
        logits = apply(params, plain(images, recipe)).astype(jnp.float32)
        known = jnp.maximum(labels, 0)
        true = jnp.take_along_axis(logits, known[:, None], 1)[:, 0]
        others = jnp.where(jax.nn.one_hot(known, logits.shape[1], dtype=bool), -jnp.inf, logits).max(1)
        near = jnp.abs(true - others) < tie * jnp.abs(logits).max(1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, known)
        readable = labels >= 0
        right = readable & (logits.argmax(-1) == labels)
        return right, near & readable, loss, readable

    parts = []
    for images, labels, real in padded_batches(split, batch_size):
        parts.append([np.asarray(x)[:real] for x in forward(params, images, labels)])
    right, near, loss, readable = map(np.concatenate, zip(*parts, strict=True))
    return Measured(int(right.sum()), int(near.sum()), float(loss[readable].mean()))


def report(checks: list[Check]) -> Report:
    """Makes the report on checks."""
    sign = {True: "ok  ", False: "FAIL", None: "--  "}
    lines = [f"{sign[agrees]} {text}" for agrees, text in checks]
    known = [agrees for agrees, _ in checks]
    return Report(False not in known, None not in known, [*lines, LIMITS])


def unflatten(arrays: dict[str, np.ndarray], like, prefix: str = ""):
    """Inverts `results.flatten`.

    Args:
      like: nested parameters of the wanted names and shapes.
    Raises:
      ValueError: an array is missing or has another shape.
    """
    if isinstance(like, dict):
        return {k: unflatten(arrays, v, f"{prefix}{k}/") for k, v in like.items()}
    name = prefix.rstrip("/")
    if name not in arrays or arrays[name].shape != like.shape:
        got = arrays[name].shape if name in arrays else "nothing"
        raise ValueError(
            f"the weights must hold {name} of shape {like.shape}, got {got}; another architecture?"
        )
    return jnp.asarray(arrays[name], jnp.float32)
