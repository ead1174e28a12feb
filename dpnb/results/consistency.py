"""Checks that a record agrees with itself, the registry, its ledger file, and well-known facts.

The mechanism is rebuilt from hyper-parameters and data, and the rest of the record is compared with it.
Nothing here needs the data set or a network; `dpnb.results.verification` adds what does.
"""

import functools
import json
import math
import pathlib
from typing import Any

from safetensors import SafetensorError, safe_open

from dpnb import experiments, privacy
from dpnb.experiments import Experiment, imagenet
from dpnb.experiments.experiment import DTYPES
from dpnb.privacy import Ledger, LedgerError
from dpnb.privacy.accounting import ALWAYS_RECORDED

Record = dict[str, Any]
Check = tuple[bool | None, str]  # whether it agrees (None: it could not be checked), and what was compared

VERSIONS = 1e-3  # relative difference allowed between the epsilons of two versions of an accountant
# Numbers of training and test images of the public data sets, None if it is not compared.
SIZES = {
    "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "digits": (1500, 297), "textures": (60_000, 3000),
    "dead-leaves": (40_000, 1000),
    "tiny_imagenet32": (100_000, 10_000), "imagenet_resized/32x32": (1_281_167, 50_000),
    **{name: (n, None) for name, n in imagenet.EXAMPLES.items()},
}  # fmt: skip
MALFORMED = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class LeftOut(UserWarning):
    """Warns that a table leaves out a record, and says why."""


def consistency(record: Record, directory: str | pathlib.Path | None = None) -> list[Check]:
    """Makes all checks that need neither the data set nor an evaluation of the network.

    Args:
      record: as `dpnb.results.record` makes it, or what `dpnb.results.release` leaves of it.
      directory: holds the record's weights and ledger, which are then compared too; the ledger of a run
        with a secret seed is in `private` beside it.
    Returns:
      One entry per check. A malformed record fails one.
    """
    try:
        made = [*cheap(record), *accounted(record), registered(record)]
        return made if directory is None else [*made, *files(record, pathlib.Path(directory))]
    except MALFORMED as error:
        return [
            (False, f"a record must have what `results.record` writes, got {type(error).__name__}: {error}")
        ]


def misfit(record: Record) -> str:
    """Says why a record whose hyper-parameters are those of a row does not belong there, "" if it does.

    It makes all cheap checks, and checks epsilons on a coarse grid: a second for ten different mechanisms.
    """
    try:
        wrong = [text for agrees, text in cheap(record) if agrees is False]
        wrong = wrong or [text for agrees, text in accounted(record, coarse=True) if agrees is False]
    except MALFORMED as error:
        return f"{type(error).__name__}: {error}"
    return "; ".join(wrong)


def experiment_of(record: Record) -> Experiment:
    """Returns the experiment that the hyper-parameters of a record describe; infinities are null in JSON.

    Raises:
      TypeError, ValueError: they do not describe one.
    """
    infinite = {name: math.inf for name in ("epsilon", "clip_norm")}
    hyper = record["hyper_parameters"]
    return Experiment(**{k: infinite.get(k) if v is None else v for k, v in hyper.items()})


def cheap(record: Record) -> list[Check]:
    """Makes the checks without accounting, in some tenths of a millisecond."""
    e = experiment_of(record)
    mechanism = e.mechanism(record["data"]["training_examples"])
    return [
        _settings(record, e),
        _privacy(record, e, mechanism),
        _ledger(record, mechanism),
        _data(record, e),
        *_accuracies(record, e),
    ]


def _settings(record: Record, e: Experiment) -> Check:
    public = record.get("pretrained") or {}
    ran = record.get("computed_in", e.compute_dtype)
    known = {*ran.split(", then "), record.get("evaluated_in", DTYPES[0])} <= set(DTYPES)
    return _same(
        "settings",
        computed_in=(ran, ran if known and e.compute_dtype == "auto" else e.compute_dtype),
        experiment=(record["experiment"], e.name),
        preset=(record["preset"], e.preset),
        seed=(record["seed"], e.seed),
        augmult=(record["augmult"], e.augmult),
        clip_norm=(_number(record["clip_norm"]), e.clip_norm),
        pretrained=(public.get("weights", ""), pathlib.Path(e.pretrained).name),
    )


def _privacy(record: Record, e: Experiment, mechanism: privacy.Mechanism) -> Check:
    p, n = record["privacy"], record["data"]["training_examples"]
    early = record["stopped"] and 0 <= p["steps"] <= e.steps
    return _same(
        f"privacy, from the hyper-parameters and {n} training images",
        noise_multiplier=(p["noise_multiplier"], mechanism.noise_multiplier),
        sampling_probability=(p["sampling_probability"], mechanism.sampling_probability),
        sampler=(p["sampler"], mechanism.sampler),
        steps=(p["steps"], p["steps"] if early else e.steps),
        delta=(p["delta"], e.delta),
        epsilon_target=(_number(p["epsilon_target"]), e.epsilon),
        epsilon_is=(p["epsilon_is"], mechanism.claim),
        neighbours=(p["neighbours"], privacy.NEIGHBOURS),
        calibrated_with=(p["calibrated_with"], e.accountant),
        seed_published=(p["seed_published"], e.seed is not None),
        exact_noise=(p.get("exact_noise", bool(e.noise_multiplier)), bool(e.noise_multiplier)),
    )


def _ledger(record: Record, mechanism: privacy.Mechanism) -> Check:
    """Compares the ledger with the steps; one that was charged twice is in the ledger twice."""
    charged, steps = privacy.counts_from_json(record["ledger"]), record["privacy"]["steps"]
    agrees = set(charged) <= {mechanism} and charged.get(mechanism, 0) >= steps
    return agrees, f"ledger: {charged or 'nothing'}, and {steps} steps of {mechanism} were made"


def _data(record: Record, e: Experiment) -> Check:
    d, n = record["data"], evaluated(record)
    train, test = d["training_examples"], e.validation or n
    if d["name"] in SIZES and (not e.image_size or d["name"] in imagenet.EXAMPLES):
        train, known = SIZES[d["name"]]
        train, test = train - e.validation, e.validation or known or n
    kind = "held-out training" if e.validation else "test"
    return _same(
        "data",
        name=(d["name"], e.dataset),
        training_examples=(d["training_examples"], train),
        evaluated_on=(record["evaluated_on"], f"{test} {kind} images"),
    )


def evaluated(record: Record) -> int:
    """Returns the number of images behind the accuracies of a record."""
    return int(record["evaluated_on"].split()[0])


def ties(n: int) -> int:
    """Returns how many of n images another machine may classify differently, without counting near-ties."""
    return max(1, n // 1000)


def _accuracies(record: Record, e: Experiment) -> list[Check]:
    """Checks that accuracies are whole numbers of images, and agree with the curve's last point.

    That point may be of the first images only.
    """
    n, curve = evaluated(record), record.get("curve") or []
    right = {name: record["accuracy"][name] * n / 100 for name in ("raw", "ema")}
    whole = all(0 <= k <= n + 1e-6 and abs(k - round(k)) < 1e-6 * n for k in right.values())
    said = ", ".join(f"{name} {record['accuracy'][name]:.4g} % is {k:.6g}" for name, k in right.items())
    made: list[Check] = [(whole, f"accuracy: {said} of {n} images, which must be whole numbers")]
    if not curve:
        return [*made, (None, "curve: the record has none, so that nothing stands for its raw accuracy")]
    steps, at = record["privacy"]["steps"], [point["step"] for point in curve]
    ended = at[-1] == steps or bool(record["stopped"])
    made.append(
        (at == sorted({*at}) and at[-1] <= steps and ended, f"curve: ends at update {at[-1]} of {steps}")
    )
    if at[-1] != steps or "raw_accuracy" not in curve[-1]:
        return [*made, (None, "curve: it ends earlier, so that nothing stands for the raw accuracy")]
    m = min(e.eval_examples, n)
    for name, k in right.items():
        head = curve[-1][f"{name}_accuracy"] * m / 100
        agrees = head - ties(n) <= k <= head + n - m + ties(n)
        text = f"{name} accuracy: {k:.6g} of {n} images, at the end of the curve {head:.6g} of {m}"
        made.append((agrees, f"{text} (within {ties(n)}: near-ties)"))
    if m < n:
        text = f"raw accuracy: the curve has {m} of {n} images and only averaged parameters are kept"
        made.append((None, f"{text}; the other {n - m} are the record's word"))
    return made


def accounted(record: Record, coarse: bool = False) -> list[Check]:
    """Compares epsilons with those of the ledger, and with the budget.

    Args:
      coarse: compare on a coarse grid first, and exactly only if they differ.
    """
    p, counts = record["privacy"], privacy.counts_from_json(record["ledger"])
    privacy.find_accountant(p["calibrated_with"])
    made, target = [], _number(p["epsilon_target"])

    def compare(what, said, charged, accountant):
        """Appends whether they agree; returns the epsilon to go by, None if it is unknown."""
        try:
            found = _epsilon(charged, p["delta"], accountant, coarse)
            if coarse and not _near(said, found):
                found = _epsilon(charged, p["delta"], accountant, False)
        except (privacy.MissingAccountant, privacy.DeltaTooSmall) as error:
            made.append((None, f"{what} {said} was not recomputed: {error}"))
            return said
        absent = said is None and found < math.inf  # recorded without an accountant
        made.append((None if absent else _near(said, found), f"{what} {said}, from the ledger {found}"))
        return said if coarse and said is not None and _near(said, found) else found

    required = (*ALWAYS_RECORDED, p["calibrated_with"])
    for accountant in privacy.ACCOUNTANTS:
        what = f"epsilon ({accountant.upper()})"
        if f"epsilon_{accountant}" not in p and accountant not in required:
            made.append((None, f"{what} is not in this record, so that nothing stands to be compared"))
            continue
        spent = compare(what, p[f"epsilon_{accountant}"], counts, accountant)
        if accountant == p["calibrated_with"] and spent is not None:
            text = f"{what} {spent} is spent, of a budget of {target}"
            made.append((spent <= target * (1 + 1e-6), text))
    end = (record.get("curve") or [{}])[-1]
    twice = sum(counts.values()) - p["steps"]  # charges of steps that were repeated with another result
    if end.get("epsilon") is not None and len(counts) == 1 and not twice:
        once = dict.fromkeys(counts, end["step"])
        compare("epsilon at the end of the curve", end["epsilon"], once, p["calibrated_with"])
    return made


def _near(said: float | None, found: float) -> bool:
    """Compares two epsilons; infinity is null in JSON."""
    return math.isclose(_number(said), found, rel_tol=VERSIONS)


def _epsilon(counts, delta: float, accountant: str, coarse: bool) -> float:
    return _cached(tuple(counts.items()), delta, accountant, coarse)


@functools.lru_cache(maxsize=4096)
def _cached(counts, delta: float, accountant: str, coarse: bool) -> float:
    return privacy.epsilon(
        privacy.compose(dict(counts)), min(1, len(counts)), delta, accountant, coarse=coarse
    )


def changed(record: Record) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (in the record, in the registry)} of what differs from the experiment of that name.

    Raises:
      KeyError, ValueError: the registry has no such name or preset.
    """
    known = experiments.get(record["experiment"], record["preset"])
    own = experiment_of(record).identity_fields()
    different = {k: (own[k], v) for k, v in known.identity_fields().items() if v is not None and own[k] != v}
    if known.noise_multiplier is None and noisier(record):
        different["noise_multiplier"] = (own["noise_multiplier"], "calibrated to spend the budget")
    return different


def noisier(record: Record) -> bool:
    """Returns whether there is clearly more noise than calibrated: all updates spend less than the budget."""
    p, target = record["privacy"], record["hyper_parameters"].get("epsilon")
    spent = p.get(f"epsilon_{p.get('calibrated_with')}")
    return not record["stopped"] and None not in (spent, target) and spent < target * (1 - VERSIONS)


def in_words(different: dict[str, tuple[Any, Any]]) -> str:
    """Formats what `changed` found, e.g. "depth 10 (registry: 16)"."""
    return ", ".join(f"{name} {mine} (registry: {theirs})" for name, (mine, theirs) in different.items())


def registered(record: Record) -> Check:
    """Compares settings with the registry.

    A changed run is an experiment without a name and in no table, which is allowed and said; but it must not
    claim another number of the paper.
    """
    name, preset, paper = record["experiment"], record["preset"], record["paper"]
    if name not in experiments.names() or preset not in experiments.PRESETS:
        return True, f"registry: it has no {name} at preset {preset}, so this is in no table"
    known, different = experiments.get(name, preset), changed(record)
    theirs = (known.paper_mean, known.paper_std)
    same = (paper["mean"], paper["std"]) == theirs
    elsewhere = "dataset" in different and paper["source"].startswith("none: ")
    if elsewhere:
        same = (paper["mean"], paper["std"]) == (None, None)
    if not same:
        beside = f"{paper['mean']} +- {paper['std']}, {paper['source']}"
        return False, f"registry: beside {name} stands {theirs[0]} +- {theirs[1]}, got {beside}"
    if not different:
        return True, f"registry: {name} at preset {preset}, nothing is changed"
    number = (
        f"; the {paper['mean']} % beside it are of the unchanged one" if paper["mean"] is not None else ""
    )
    return True, f"settings changed from the registry: {in_words(different)}; in no table{number}"


def files(record: Record, directory: pathlib.Path) -> list[Check]:
    """Compares a record with the files beside it: metadata of its weights, and its ledger."""
    private = directory.parent / "private" if directory.name == "release" else directory
    weights, ledger = directory / "ema.safetensors", private / "ledger.jsonl"
    made = [_weights(record, weights)] if weights.is_file() else []
    return [*made, *([_journal(record, ledger)] if ledger.is_file() else [])]


def _weights(record: Record, path: pathlib.Path) -> Check:
    try:
        with safe_open(path, "numpy") as file:
            says = (file.metadata() or {}).get("saw")
    except SafetensorError as error:
        return False, f"weights: {path} must be a safetensors file, but is damaged ({error})"
    if says is None:
        return (
            None,
            f"weights: {path.name} does not say what it was trained on (written by an earlier version)",
        )
    d, public = record["data"], record.get("pretrained")
    expected = f"{d['name']}, as {record['experiment']} (fingerprint {d['fingerprint']})"
    expected += f"; before that {public['saw']}" if public else ""
    agrees = says == expected
    return agrees, f"weights: they saw {says}" + ("" if agrees else f", the record says {expected}")


def _journal(record: Record, path: pathlib.Path) -> Check:
    try:
        ledger = Ledger.open(path, read_only=True)
    except LedgerError as error:
        old = _first_line(path).get("ledger") == 1
        return None if old else False, f"ledger file: {error}"
    e = experiment_of(record)
    return _same(
        f"{path.name}, of {ledger.steps} charged steps",
        ledger=(privacy.counts_from_json(record["ledger"]), privacy.counts_from_json(ledger.events())),
        epsilon=(e.epsilon, ledger.budget.epsilon),
        delta=(e.delta, ledger.budget.delta),
        accountant=(e.accountant, ledger.accountant),
    )


def _first_line(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_bytes().split(b"\n")[0])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(x: float | None) -> float:
    return math.inf if x is None else x


def _same(what: str, **pairs: tuple[Any, Any]) -> Check:
    """Checks pairs (in the record, what it must be)."""
    wrong = [
        f"{name} must be {must}, got {got}" for name, (got, must) in pairs.items() if not _equal(got, must)
    ]
    said = ", ".join(f"{name} {must}" for name, (_, must) in pairs.items() if must not in ("", None))
    return not wrong, f"{what}: {'; '.join(wrong) or said}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b)]
        return all(numbers) and math.isclose(a, b, rel_tol=1e-12)
    return type(a) is type(b) and a == b
