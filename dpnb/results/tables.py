"""The tables "paper | ours | difference", and the text of their rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpnb import experiments, privacy
from dpnb.experiments import imagenet
from dpnb.results import plan
from dpnb.results.consistency import MALFORMED, changed, in_words
from dpnb.results.store import runs_of_cell, warn_left_out

WITHIN = 1.0  # points; repeated runs of one setting spread by 0.8 to 0.9


def row(result: dict[str, Any]) -> str:
    """Describes one run in one line, beside the paper's number."""
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
    """Puts the paper's numbers beside ours: one row per experiment and preset that was run.

    Args:
      pattern: of experiment names, e.g. "cifar10/*".
      results: records, as `load` returns them.
    Returns:
      pandas.DataFrame; ours is EMA accuracy in percent, mean +- standard deviation over n seeds.
      A row without a number of the paper or of ours is left out (`dpnb list` shows all experiments).
      A difference is shown at preset "paper" only, since other presets are other experiments. Runs whose
      hyper-parameters were changed, which are experiments without a name, are left out, and so are records
      that do not fit their row (see `matching_records`); the warning `dpnb.results.consistency.LeftOut`
      says why.
    """
    import pandas

    rows = []
    _say_changed([r for r in results if r["experiment"] in experiments.names(pattern)])
    for name in experiments.names(pattern):
        e = experiments.get(name)
        base = {"experiment": name, "epsilon": e.epsilon, "paper": published(e)}
        for preset in experiments.PRESETS:
            runs = runs_of_cell(name, preset, results)
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


def excerpt(rows: Sequence[tuple[str, str]], results: list[dict[str, Any]]):
    """Returns some rows of `table`, given as (experiment, preset), with the columns that fit a short page.

    Raises:
      ValueError: there is no record for one of them.
    """
    import pandas

    frames = [table(name, results) for name in dict.fromkeys(name for name, _ in rows)]
    whole = pandas.concat(frames).set_index(["experiment", "preset"], drop=False)
    missing = [row for row in rows if row not in whole.index or whole.loc[row, "n"] == "-"]
    if missing:
        raise ValueError(f"an excerpt shows rows with runs behind them, got none for {missing}")
    columns = ["experiment", "epsilon", "preset", "paper", "ours", "n", "status"]
    return whole.loc[list(rows), columns].reset_index(drop=True)


def _say_changed(records: list[dict[str, Any]]) -> None:
    """Warns about each record whose settings are not those of the row that it names, or that was stopped."""
    for r in records:
        try:
            different = in_words(changed(r))
        except MALFORMED as error:
            different = f"{type(error).__name__}: {error}"
        if different:
            warn_left_out(r, f"settings changed from the registry: {different}")
        elif r["stopped"]:
            warn_left_out(r, f"stopped: {r['stopped']}")


def status(experiment: experiments.Experiment, results: list[dict[str, Any]]) -> str:
    """Sums up the records at preset "paper" (see `verdict`), or says "runnable" and what was run smaller."""
    runs = {preset: runs_of_cell(experiment.name, preset, results) for preset in experiments.PRESETS}
    if full := runs["paper"]:
        return f"{verdict(experiment, full)} (n = {len(full)})"
    smaller = ", ".join(p for p in experiments.PRESETS if runs[p])
    could = possibility(experiment, results)
    return f"{could} (run at {smaller})" if smaller else could


def published(experiment: experiments.Experiment) -> str:
    """Formats the published number with its spread, "-" if none is known.

    "(unverified)" follows if it was not checked, and its authors if it is not the paper's.
    """
    number, source = spread(experiment.paper_mean, experiment.paper_std), experiment.paper_source
    if experiment.paper_mean is None:
        return number
    others = source.split(": ")[-1].split(",")[0] if source.startswith("not in the paper") else ""
    return number + (f" ({others})" if others else " (unverified)" if "unverified" in source else "")


def possibility(experiment: experiments.Experiment, records: list[dict[str, Any]] | None = None) -> str:
    """Says whether an experiment can be run, and (ImageNet, Places) in how many hours of one accelerator, as `dpnb plan` does."""
    if experiment.impossible:
        return "impossible in public"
    if experiment.dataset not in imagenet.EXAMPLES:
        return "runnable"
    row = plan.on("H100", experiment, records)
    if np.isnan(row.hours):
        return "runnable, but not on one H100"
    cost = f"{row.hours:,.0f} H100-hours" if row.hours >= 1 else f"{60 * row.hours:.0f} H100-minutes"
    return f"runnable, about {cost} ({row.how.partition(':')[0]})"


def verdict(experiment: experiments.Experiment, runs: list[dict[str, Any]]) -> str:
    """Judges runs at full scale.

    "reproduced" means that the mean is at most a point below the published one, or above it; "reached, by our
    own way" means the same if that one is of other authors, whose method differs from ours.
    """
    if experiment.paper_mean is None:
        return "run, nothing published"
    ours = np.mean([r["accuracy"]["ema"] for r in runs])
    reached = "reproduced" if experiment.paper_source.startswith("paper") else "reached, by our own way"
    return reached if ours >= experiment.paper_mean - WITHIN else "run, falls short"


def spread(mean: float | None, std: float | None) -> str:
    """Formats "81.4 +- 0.2", "81.4" if the spread is unknown, "-" if nothing is known."""
    return "-" if mean is None else f"{mean}" if std is None else f"{mean} +- {std}"


def markdown(frame) -> str:
    """Formats a data frame as a Markdown table."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).values]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def insert(document: str, name: str, frame) -> str:
    """Renews the table between the markers `<!-- table NAME -->` and `<!-- end -->` of a document.

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
        "minutes": f"{np.mean(minutes(runs)):.1f}" if minutes(runs) else "-",
        "devices": ", ".join(sorted({r["devices"].split(",")[0] for r in runs})),
        "status": (verdict(experiment, runs) if preset == "paper" else "run at smaller scale")
        + (" (nominal epsilon)" if nominal else ""),
    }


def minutes(runs: list[dict[str, Any]]) -> list[float]:
    """Returns the minutes that each run took; released records of secret runs do not say."""
    return [r["seconds"] / 60 for r in runs if r["seconds"] is not None]
