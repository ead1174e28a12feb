"""Result records that describe themselves, and the tables "paper | ours | difference"."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save as serialised

from dpnb import experiments, privacy, release
from dpnb.checkpoints import run_seed
from dpnb.consistency import MALFORMED, LeftOut, changed, in_words, misfit, noisier
from dpnb.data import Dataset
from dpnb.experiments import imagenet, literature
from dpnb.files import private_folder, write_whole
from dpnb.models.registry import label
from dpnb.privacy.statement import privacy_statement
from dpnb.training import Run

WITHIN = 1.0  # points: re-runs of one setting spread by 0.8 to 0.9
PACKAGES = ("dpnb", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "dp-accounting", "numpy")


def record(run: Run, data: Dataset) -> dict[str, Any]:
    """One run as plain JSON values; `recompute_epsilon` can check its privacy from itself.

    Epsilons are recomputed from the ledger, under each accountant, at the experiment's delta;
    None where the accountant is not installed (recompute later) and for infinity. A secret
    seed (`seed=None`) is not in it, but hashes and exact statistics of the training data are:
    `release.record` is what may be published.
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
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "peak_memory_mib": peak_memory_mib(),
        "versions": {"python": platform.python_version(), **versions()},
        "git_revision": git_revision(),
        "stopped": run.stopped,
        "hyper_parameters": {k: finite(v) for k, v in dataclasses.asdict(e).items()},
        "curve": [{k: finite(v) for k, v in point.items()} for point in run.history],
        "ledger": run.events,
    }


def peak_memory_mib() -> int | None:
    """The most host memory that this process has held so far, MiB; None where nobody says."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(kib / 1024)


def save(run: Run, data: Dataset, directory: str | pathlib.Path) -> dict[str, Any]:
    """Writes `result.json`, its `privacy.md`, and the averaged parameters (`ema.safetensors`, float32).

    They go to `directory`, where the data are public. With a secret seed they go to `directory/release`
    (`directory/private`, if the run has no privacy claim) without anything exact about the training data, and
    the full record to `directory/private/full-result.json`.

    Returns:
      The record as in `result.json`.
    """
    e, made = run.experiment, record(run, data)
    if jax.process_index():  # the first process writes for all
        return made
    private = all(m.private for m in privacy.counts_from_json(run.events))
    folder = release.folder(directory, e.seed is None, private)
    if e.seed is None:
        kept = private_folder(directory, secret=True)
        write_whole(kept / release.FULL_RECORD, _json(made), mode=0o600)
        made = release.record(made, run_seed(kept, None)[0])
    saw = f"{data.name}, as {e.name} (fingerprint {made['data']['fingerprint']})"
    if run.public:
        saw += f"; before that {run.public['saw']}"
    write_whole(folder / "ema.safetensors", serialised(flatten(run.ema_params), {"saw": saw}))
    write_whole(folder / release.RECORD, _json(made))
    write_whole(folder / "privacy.md", statement(made) + "\n")
    return made


def _json(made: dict[str, Any]) -> str:
    return json.dumps(made, indent=1, allow_nan=False) + "\n"


def statement(result: dict[str, Any]) -> str:
    """The privacy statement of a record, in prose."""
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


def flatten(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Nested parameters as {"blocks/0/conv1/kernel": array, ...}."""
    if not isinstance(params, dict):
        return {prefix.rstrip("/"): np.asarray(params)}
    parts = [flatten(v, f"{prefix}{k}/") for k, v in params.items()]
    return {k: v for part in parts for k, v in part.items()}


def recompute_epsilon(events: list[dict[str, Any]], delta: float, accountant: str) -> float | None:
    """Epsilon of a ledger; None for infinity, or where nobody can say: dp-accounting is not installed, or
    delta is too small for PLD."""
    try:
        return finite(privacy.epsilon(privacy.events_from_json(events), 1, delta, accountant))
    except (privacy.MissingAccountant, privacy.DeltaTooSmall):
        return None


def load(root: str | pathlib.Path, name: str = release.RECORD) -> list[dict[str, Any]]:
    """All records below a directory, oldest first; full ones of secret runs by `release.FULL_RECORD`."""
    found = [json.loads(p.read_text()) for p in sorted(pathlib.Path(root).rglob(name))]
    return sorted(found, key=lambda r: r["finished"])


def of(experiment: experiments.Experiment, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished records of this experiment, whatever name and seed it ran under.

    A cell that stands in several tables is trained once: the records that match are those whose
    hyper-parameters are all equal, what was calibrated (None in `experiment`) left out: calibrated noise is
    that which spends the budget. One that does not bear them out (its epsilons, mechanism, ledger, data or
    accuracies are others) is left out with the warning `dpnb.consistency.LeftOut`; weights are not looked
    at, see `dpnb verify`.
    """
    default = {f.name: f.default for f in dataclasses.fields(experiment)}
    wanted = {k: finite(v) for k, v in experiment.decisive().items() if v is not None}

    def same(record):
        hyper = record["hyper_parameters"]
        equal = all(hyper.get(k, default[k]) == v for k, v in wanted.items())
        return equal and not (experiment.noise_multiplier is None and noisier(record))

    return [r for r in records if not r["stopped"] and same(r) and _fits(r)]


def _fits(record: dict[str, Any]) -> bool:
    """Whether a record bears out its hyper-parameters; warns if not."""
    if why := misfit(record):
        _left_out(record, why)
    return not why


def _left_out(record: dict[str, Any], why: str) -> None:
    which = (
        f"{record['experiment']} [{record['preset']}, seed {record['seed']}, finished {record['finished']}]"
    )
    warnings.warn(f"left out of all tables: the record {which}: {why}", LeftOut, stacklevel=4)


def cell(name: str, preset: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of one cell of a table, one per seed: runs whose settings were changed are others."""
    runs = [
        r
        for r in of(experiments.get(name, preset), records)
        if (r["experiment"], r["preset"]) == (name, preset)
    ]
    return one_per_seed(runs)


def one_per_seed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of several records of one published seed the last; secret seeds all differ, and all stay."""
    published = {r["seed"]: r for r in runs if r["seed"] is not None}
    return [*published.values(), *(r for r in runs if r["seed"] is None)]


def row(result: dict[str, Any]) -> str:
    """One run in one line, beside the paper's number."""
    p, paper = result["privacy"], result["paper"]
    epsilons = ", ".join(
        f"{name.upper()} {p[f'epsilon_{name}']:.3f}"
        for name in privacy.ACCOUNTANTS
        if p.get(f"epsilon_{name}") is not None
    )
    theirs = "" if paper["mean"] is None else f" (paper: {spread(paper['mean'], paper['std'])} %)"
    took = "" if result["seconds"] is None else f"{result['seconds'] / 60:.1f} minutes on "
    return (
        f"{result['experiment']} [{result['preset']}, seed {result['seed']}] on {result['data']['name']}: "
        f"EMA {result['accuracy']['ema']:.2f} %, raw {result['accuracy']['raw']:.2f} %{theirs} at "
        f"{p['epsilon_is']} epsilon {epsilons or 'infinite'}, delta {p['delta']:g}, sigma "
        f"{p['noise_multiplier']:.4g}, q {p['sampling_probability']:.4g}, {p['steps']} steps, "
        f"{p['sampler']} sampling, {p['neighbours']}; {took}{result['devices']}"
    )


def table(pattern: str, results: list[dict[str, Any]]):
    """The paper's numbers beside ours: one row per experiment and preset that was run.

    Args:
      pattern: of experiment names, e.g. "cifar10/*".
      results: records, as `load` returns them.
    Returns:
      pandas.DataFrame; ours is EMA accuracy in percent, mean +- standard deviation over n seeds.
      A row that neither the paper nor we have a number for is left out (`dpnb list` has them all).
      A difference is shown at preset "paper" only: other presets are other experiments. Runs whose
      hyper-parameters were changed are experiments without a name, and not in it; nor is what does not fit
      its row (see `of`). Of both the warning `dpnb.consistency.LeftOut` says why.
    """
    import pandas

    rows = []
    _say_changed([r for r in results if r["experiment"] in experiments.names(pattern)])
    for name in experiments.names(pattern):
        e = experiments.get(name)
        base = {"experiment": name, "epsilon": e.epsilon, "paper": published(e)}
        for preset in experiments.PRESETS:
            runs = cell(name, preset, results)
            if runs:
                rows.append({**base, **_ours(runs, preset, e)})
            elif preset == "paper" and e.paper_mean is not None:
                rows.append({**base, "preset": "paper", "ours": "-", "status": possibility(e)})
    columns = [
        "experiment",
        "epsilon",
        "preset",
        "paper",
        "ours",
        "n",
        "difference",
        "minutes",
        "devices",
        "status",
    ]
    return pandas.DataFrame(rows, columns=columns, dtype=object).fillna("-")  # counts stay whole


def _say_changed(records: list[dict[str, Any]]) -> None:
    """A warning for each record whose settings are not those of the row that it names, or that was stopped."""
    for r in records:
        try:
            different = in_words(changed(r))
        except MALFORMED as error:
            different = f"{type(error).__name__}: {error}"
        if different:
            _left_out(r, f"settings changed from the registry: {different}")
        elif r["stopped"]:
            _left_out(r, f"stopped: {r['stopped']}")


def status(experiment: experiments.Experiment, results: list[dict[str, Any]]) -> str:
    """What the records at preset "paper" say (see `verdict`), else "runnable" and what was run smaller."""
    runs = {preset: cell(experiment.name, preset, results) for preset in experiments.PRESETS}
    if full := runs["paper"]:
        return f"{verdict(experiment, full)} (n = {len(full)})"
    smaller = ", ".join(p for p in experiments.PRESETS if runs[p])
    could = possibility(experiment)
    return f"{could} (run at {smaller})" if smaller else could


def published(experiment: experiments.Experiment) -> str:
    """The published number with its spread, "(unverified)" where it was not checked, whose it is where it is
    not the paper's, "-" where nothing is known."""
    number, source = spread(experiment.paper_mean, experiment.paper_std), experiment.paper_source
    if experiment.paper_mean is None:
        return number
    others = source.split(": ")[-1].split(",")[0] if source.startswith("not in the paper") else ""
    return number + (f" ({others})" if others else " (unverified)" if "unverified" in source else "")


def possibility(experiment: experiments.Experiment) -> str:
    """Can anybody run it, and (on ImageNet and Places) for how many hours of one accelerator?"""
    if experiment.impossible:
        return "impossible in public"
    if experiment.dataset not in imagenet.EXAMPLES:
        return "runnable"
    hours = imagenet.device_hours(experiment)
    cost = f"about {hours:,.0f} H100-hours" if hours >= 1 else f"about {60 * hours:.0f} H100-minutes"
    return f"runnable, {cost} (assumed speed)"


def verdict(experiment: experiments.Experiment, runs: list[dict[str, Any]]) -> str:
    """Of runs at full scale: "reproduced" is a mean of at most a point below the published one; "reached, by
    our own way" where that is of other authors, whose method differs from ours."""
    if experiment.paper_mean is None:
        return "run, nothing published"
    ours = np.mean([r["accuracy"]["ema"] for r in runs])
    reached = "reproduced" if experiment.paper_source.startswith("paper") else "reached, by our own way"
    return reached if ours >= experiment.paper_mean - WITHIN else "run, falls short"


def spread(mean: float | None, std: float | None) -> str:
    """ "81.4 +- 0.2", "81.4" where the spread is unknown, "-" where nothing is."""
    return "-" if mean is None else f"{mean}" if std is None else f"{mean} +- {std}"


def summary(cells: list[experiments.Experiment], records: list[dict[str, Any]], fields=()):
    """Mean, standard deviation and number of runs of each cell of a study, one run per seed.

    Args:
      cells: at one preset, seed of no matter; each takes the records that `of` finds for it.
      records: as `load` returns them.
      fields: further fields of the experiments to have as columns, e.g. ("learning_rate",).
    Returns:
      pandas.DataFrame, one row per cell, in that order: cell, network, B (expected batch size, images),
      T (updates), K (views per image), `fields`, epsilon (see `spent`; that of the default accountant) and
      epsilon_rdp (likewise for each other accountant; RDP is the paper's), noise_multiplier, ema and raw
      accuracy in percent, ema_std (NaN for one run), n, minutes, `first` (False for a cell that is the
      same experiment at this scale as one above it) and `note` (what the records say of their images).
      Cells without records have n = 0.
    """
    import pandas

    rows, seen = [], set()
    others = [a for a in privacy.ACCOUNTANTS if a != privacy.DEFAULT_ACCOUNTANT]
    for e in cells:
        runs = one_per_seed(of(e, records))
        ema = [r["accuracy"]["ema"] for r in runs]

        def mean(values):
            return float(np.mean(values)) if values else math.nan

        rows.append(
            {
                "cell": e.name.split("/", 2)[-1],
                "network": label(e),
                "B": e.expected_batch_size,
                "T": e.steps,
                "K": e.augmult,
                **{name: getattr(e, name) for name in fields},
                "epsilon": mean([spent(r) for r in runs]),
                **{f"epsilon_{a}": mean([spent(r, a) for r in runs]) for a in others},
                "noise_multiplier": mean([r["privacy"]["noise_multiplier"] for r in runs]),
                "ema": mean(ema),
                "ema_std": float(np.std(ema, ddof=1)) if len(ema) > 1 else math.nan,
                "raw": mean([r["accuracy"]["raw"] for r in runs]),
                "n": len(runs),
                "minutes": mean(_minutes(runs)),
                "first": e.fingerprint() not in seen,
                "note": "; ".join(sorted({r["data"]["note"] for r in runs} - {""})),
            }
        )
        seen.add(e.fingerprint())
    return pandas.DataFrame(rows)


def spent(result: dict[str, Any], accountant: str = privacy.DEFAULT_ACCOUNTANT) -> float:
    """Epsilon of a record: infinity for a run that is not private, NaN if nobody computed it.

    Raises:
      ValueError: an unknown accountant.
    """
    privacy.find_accountant(accountant)
    p = result["privacy"]
    if p.get(f"epsilon_{accountant}") is not None:
        return p[f"epsilon_{accountant}"]
    mechanism = privacy.Mechanism(p["noise_multiplier"], p["sampling_probability"], p["sampler"])
    return math.nan if mechanism.private else math.inf


def scale(frame) -> str:
    """What the cells of a `summary` run at: "WRN-10-1, B 128 to 512, T 77, K 0 to 2".

    B: images per update; T: updates; K: views per image.
    """

    def span(name):
        values = [f"{v:,}" if isinstance(v, int) else str(v) for v in sorted({*frame[name]})]
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return f"{span('network')}, " + ", ".join(f"{name} {span(name)}" for name in "BTK")


def counts(frame) -> str:
    """Runs behind the cells of a `summary`: "n = 2", or one number per cell: "n = 3, 3, 2"."""
    return "n = " + ", ".join(map(str, frame["n"] if frame["n"].nunique() > 1 else frame["n"][:1]))


def study(frame) -> str:
    """A `summary` as a Markdown table, each different run once, and what the records say of their images."""
    text = markdown(tidy(frame[frame["first"]].drop(columns=["first", "note"])))
    if np.isinf(frame["epsilon"]).any():
        text += "\n\nEpsilon inf: no noise, or (sigma below 0.1) too little to be accounted."
    notes = sorted({*frame["note"]} - {""})
    return text + "".join(f"\n\nImages of these runs: {note}." for note in notes)


def tidy(frame, digits: int = 2):
    """A data frame to be shown: rounded, "-" where there is no number."""
    return frame.round(digits).astype(object).fillna("-")


class Difference(NamedTuple):
    """Mean accuracy of one cell minus that of another (points), its standard error, runs of each."""

    mean: float
    error: float
    n: int
    n_other: int


def difference(frame, cell: str, other: str) -> Difference:
    """How much better `cell` is than `other`, two rows of a `summary`, over all seeds of each.

    Runs are independent, also at one seed (two releases must not share noise), so nothing is paired: the
    standard error is sqrt(s^2 / n + s_other^2 / n_other), NaN where an n is below 2.
    """
    a, b = (frame[frame["cell"] == name].iloc[0] for name in (cell, other))
    error = math.sqrt(a["ema_std"] ** 2 / max(a["n"], 1) + b["ema_std"] ** 2 / max(b["n"], 1))
    return Difference(float(a["ema"] - b["ema"]), error, int(a["n"]), int(b["n"]))


def differences(frame, pairs: list[tuple[str, str, str]]):
    """The `difference` of each pair of cells that both have runs.

    Args:
      frame: from `summary`.
      pairs: (what it is, cell with it, cell without it).
    Returns:
      pandas.DataFrame: what, points, standard error, n with, n without.
    """
    import pandas

    ran = {*frame["cell"][frame["n"] > 0]}
    rows = [(what, *difference(frame, a, b)) for what, a, b in pairs if {a, b} <= ran]
    return pandas.DataFrame(rows, columns=["what", "points", "standard error", "n with", "n without"])


def series(records: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float | None]]]:
    """Everybody's accuracy against epsilon on CIFAR-10 without extra data, for `plots.accuracy_epsilon`.

    Returns:
      {label: [(epsilon, test accuracy in percent, standard deviation or None), ...]}: ours, by network and
      preset (runs whose settings were changed are not in it), the paper's, and `experiments.literature`.
    """
    made, paper = {}, {}
    for name in ("scatter-linear", "wrn-16-4", "wrn-40-4"):
        cells = [experiments.get(n) for n in experiments.names(f"cifar10/{name}/*")]
        for preset in experiments.PRESETS:
            ran = [(e, cell(e.name, preset, records)) for e in cells]
            ran = [(experiments.get(e.name, preset), runs) for e, runs in ran if runs]
            if ran:
                frame = summary([e for e, _ in ran], [r for _, runs in ran for r in runs])
                small = "" if preset == "paper" else f" at preset {preset}"
                where = scale(frame).removeprefix(f"{label(cells[0])}, ")
                ours = f"ours: {label(cells[0])}{small} ({where}), {counts(frame)}"
                made[ours] = [
                    (e.epsilon, row["ema"], None if row["n"] == 1 else row["ema_std"])
                    for (e, _), (_, row) in zip(ran, frame.iterrows(), strict=True)
                ]
        if name.startswith("wrn"):
            flag = _unverified([(e.epsilon, e.paper_source) for e in cells])
            paper[f"paper, {name.upper()}{flag}"] = [(e.epsilon, e.paper_mean, e.paper_std) for e in cells]
    others = {}
    for r in literature.CIFAR10:
        others.setdefault((r.when, r.method), []).append(r)
    reported = {
        f"{when}: {method}{_unverified([(r.epsilon, r.source) for r in rows])}": [
            (r.epsilon, r.mean, r.std) for r in rows
        ]
        for (when, method), rows in others.items()
    }
    return made | paper | reported


def _unverified(sources: list[tuple[float, str]]) -> str:
    """What to add to the label of such points, (epsilon, source): "" if all were checked."""
    checked = [f"{epsilon:g}" for epsilon, source in sources if "unverified" not in source]
    if len(checked) == len(sources):
        return ""
    return f" (unverified but for epsilon {', '.join(checked)})" if checked else " (unverified)"


def markdown(frame) -> str:
    """A data frame as a Markdown table."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).values]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def insert(document: str, name: str, frame) -> str:
    """`document` with the table between its markers `<!-- table NAME -->` and `<!-- end -->` renewed.

    Raises:
      ValueError: the document has no such markers.
    """
    before, start, rest = document.partition(f"<!-- table {name} -->")
    _, end, after = rest.partition("<!-- end -->")
    if not (start and end):
        raise ValueError(f"the document must hold the lines <!-- table {name} --> and <!-- end -->, got none")
    return f"{before}{start}\n{markdown(frame)}\n{end}{after}"


def _ours(runs, preset, experiment) -> dict[str, Any]:
    accuracies = [r["accuracy"]["ema"] for r in runs]
    deviation = f" +- {np.std(accuracies, ddof=1):.1f}" if len(runs) > 1 else ""
    full = preset == "paper" and experiment.paper_mean is not None
    nominal = any(r["privacy"]["epsilon_is"] != "valid" for r in runs)
    return {
        "preset": preset,
        "ours": f"{np.mean(accuracies):.1f}{deviation}",
        "n": len(runs),
        "difference": f"{np.mean(accuracies) - experiment.paper_mean:+.1f}" if full else "-",
        "minutes": f"{np.mean(_minutes(runs)):.1f}" if _minutes(runs) else "-",
        "devices": ", ".join(sorted({r["devices"].split(",")[0] for r in runs})),
        "status": (verdict(experiment, runs) if preset == "paper" else "run at smaller scale")
        + (" (nominal epsilon)" if nominal else ""),
    }


def _minutes(runs: list[dict[str, Any]]) -> list[float]:
    """What each run took; released records of secret runs do not say."""
    return [r["seconds"] / 60 for r in runs if r["seconds"] is not None]


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str:
    """Of this checkout, with "+" if it is changed; "" outside one."""
    here = pathlib.Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def finite(x: Any) -> Any:
    """JSON has no infinity: None."""
    return None if isinstance(x, float) and not math.isfinite(x) else x
