"""Studies: the records of many cells as data frames, differences and curves."""

import math
from typing import Any, NamedTuple

import numpy as np

from dpnb import experiments, privacy
from dpnb.experiments import literature
from dpnb.models.registry import label
from dpnb.results.store import matching_records, one_per_seed, runs_of_cell
from dpnb.results.tables import markdown, minutes


def summary(cells: list[experiments.Experiment], records: list[dict[str, Any]], fields=()):
    """Computes mean, standard deviation and number of runs of each cell of a study, one run per seed.

    Args:
      cells: at one preset, with any seed; each takes the records that `matching_records` finds for it.
      records: as `load` returns them.
      fields: further fields of the experiments to add as columns, e.g. ("learning_rate",).
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
        runs = one_per_seed(matching_records(e, records))
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
                "minutes": mean(minutes(runs)),
                "first": e.fingerprint() not in seen,
                "note": "; ".join(sorted({r["data"]["note"] for r in runs} - {""})),
            }
        )
        seen.add(e.fingerprint())
    return pandas.DataFrame(rows)


def spent(result: dict[str, Any], accountant: str = privacy.DEFAULT_ACCOUNTANT) -> float:
    """Returns the epsilon of a record: infinity for a run that is not private, NaN if it was not computed.

    Raises:
      ValueError: the accountant is unknown.
    """
    privacy.find_accountant(accountant)
    p = result["privacy"]
    if p.get(f"epsilon_{accountant}") is not None:
        return p[f"epsilon_{accountant}"]
    mechanism = privacy.Mechanism(p["noise_multiplier"], p["sampling_probability"], p["sampler"])
    return math.nan if mechanism.has_noise else math.inf


def scale(frame) -> str:
    """Describes the scale of the cells of a `summary`: "WRN-10-1, B 128 to 512, T 77, K 0 to 2".

    B: images per update; T: updates; K: views per image.
    """

    def span(name):
        values = [f"{v:,}" if isinstance(v, int) else str(v) for v in sorted({*frame[name]})]
        return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"

    return f"{span('network')}, " + ", ".join(f"{name} {span(name)}" for name in "BTK")


def counts(frame) -> str:
    """Says how many runs each cell of a `summary` has: "n = 2", or one number per cell: "n = 3, 3, 2"."""
    return "n = " + ", ".join(map(str, frame["n"] if frame["n"].nunique() > 1 else frame["n"][:1]))


def study(frame) -> str:
    """Formats a `summary` as a Markdown table, each different run once, with the notes about their images."""
    text = markdown(tidy(frame[frame["first"]].drop(columns=["first", "note"])))
    if np.isinf(frame["epsilon"]).any():
        text += "\n\nEpsilon inf: no noise, or (sigma below 0.1) too little to be accounted."
    notes = sorted({*frame["note"]} - {""})
    return text + "".join(f"\n\nImages of these runs: {note}." for note in notes)


def tidy(frame, digits: int = 2):
    """Rounds a data frame for display, with "-" in place of missing numbers."""
    return frame.round(digits).astype(object).fillna("-")


class Difference(NamedTuple):
    """Mean accuracy of one cell minus that of another (points), its standard error, and the runs of each."""

    mean: float
    error: float
    n: int
    n_other: int


def difference(frame, cell: str, other: str) -> Difference:
    """Computes how much better `cell` is than `other`, two rows of a `summary`, over all seeds of each.

    Runs are independent even with the same seed (two releases must not share noise), so nothing is paired:
    the standard error is sqrt(s^2 / n + s_other^2 / n_other), NaN if an n is below 2.
    """
    a, b = (frame[frame["cell"] == name].iloc[0] for name in (cell, other))
    error = math.sqrt(a["ema_std"] ** 2 / max(a["n"], 1) + b["ema_std"] ** 2 / max(b["n"], 1))
    return Difference(float(a["ema"] - b["ema"]), error, int(a["n"]), int(b["n"]))


def differences(frame, pairs: list[tuple[str, str, str]]):
    """Computes the `difference` of each pair of cells that both have runs.

    Args:
      frame: from `summary`.
      pairs: (what is compared, cell with it, cell without it).
    Returns:
      pandas.DataFrame: what, points, standard error, n with, n without.
    """
    import pandas

    ran = {*frame["cell"][frame["n"] > 0]}
    rows = [(what, *difference(frame, a, b)) for what, a, b in pairs if {a, b} <= ran]
    return pandas.DataFrame(rows, columns=["what", "points", "standard error", "n with", "n without"])


def series(records: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, float | None]]]:
    """Collects accuracy against epsilon on CIFAR-10 without extra data, for `plots.accuracy_epsilon`.

    Returns:
      {label: [(epsilon, test accuracy in percent, standard deviation or None), ...]}: ours, by network and
      preset (without runs whose settings were changed), the paper's, and those of `experiments.literature`.
    """
    made, paper = {}, {}
    for name in ("patch-linear", "scatter-linear", "wrn-16-4", "wrn-40-4"):
        cells = [experiments.get(n) for n in experiments.names(f"cifar10/{name}/*")]
        for preset in experiments.PRESETS:
            ran = [(e, runs_of_cell(e.name, preset, records)) for e in cells]
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
        if cells[0].paper_source.startswith("paper"):
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
    """Returns what to add to the label of points (epsilon, source): "" if all were checked."""
    checked = [f"{epsilon:g}" for epsilon, source in sources if "unverified" not in source]
    if len(checked) == len(sources):
        return ""
    return f" (unverified but for epsilon {', '.join(checked)})" if checked else " (unverified)"
