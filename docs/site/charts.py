"""Pictures of the first page that show a table: the published numbers beside ours. All have one style."""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dpnb.notebook import BLUE, GREEN, GREY, ORANGE, RED

PALETTE = (BLUE, ORANGE, GREEN, RED, GREY)
WIDTH = 5.6  # inches; text of 9 points is then as large as that of the page


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draws what is drawn inside in the style of the site."""
    settings = {
        "axes.prop_cycle": mpl.cycler(color=PALETTE), "font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False,
        "axes.spines.right": False, "svg.hashsalt": "dpnb", "legend.frameon": False, "image.cmap": "cividis",
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def fitted(figure: Figure, height: float | None = None) -> Figure:
    """Brings a figure of `dpnb.plots` to the width of the first page; a height in inches replaces its own."""
    figure.set_size_inches(WIDTH, height or min(figure.get_size_inches()[1], 4.4))
    return figure


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure as SVG, the same bytes whenever it is drawn from the same records."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def number(text: str) -> tuple[float, float]:
    """Returns mean and standard deviation of a cell such as "79.5 +- 0.7 (unverified)"; 0 if no spread is known.

    >>> number("79.5 +- 0.7 (unverified)"), number("67.0")
    ((79.5, 0.7), (67.0, 0.0))
    """
    mean, _, rest = text.split("(")[0].partition("+-")
    return float(mean), float(rest or 0)


def against_epsilon(frame, title: str) -> Figure:
    """Plots a table's accuracies against epsilon: the paper's networks, other authors' numbers, and ours.

    Args:
      frame: from `dpnb.results.table`.
      title: above the figure.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.4), layout="constrained")
    frame = frame.assign(family=frame["experiment"].str.split("/").str[1].str.upper())
    paper = frame[(frame["paper"] != "-") & (frame["preset"] == "paper")]
    others = paper["paper"].str.contains(r"\((?!unverified)", regex=True)
    looks = iter([(ORANGE, "s", "--"), (RED, "D", ":")])
    for name, rows in paper[~others].groupby("family", sort=False):
        colour, marker, line = next(looks)
        flagged = rows["paper"].str.contains("unverified")
        known = ", ".join(f"{e:g}" for e in rows["epsilon"][~flagged])
        flag = (
            " (unverified)"
            if flagged.all()
            else f" (unverified but for epsilon {known})"
            if flagged.any()
            else ""
        )
        drawn(axis, rows, "paper", f"paper, {name}{flag}", colour, marker, line, hollow=True)
    for name, rows in paper[others].groupby("family", sort=False):
        whose = rows["paper"].iloc[0].partition("(")[2].rstrip(")")
        drawn(axis, rows, "paper", f"{whose}, {name.lower()}", GREEN, "^", "none", hollow=True)
    ran = frame[frame["n"] != "-"]
    full = ran[ran["preset"] == "paper"]
    looks = itertools.cycle([("o", "-"), ("v", "-.")])
    for (name, rows), (marker, line) in zip(full.groupby("family", sort=False), looks, strict=False):
        n = ", ".join(str(k) for k in rows["n"])
        drawn(axis, rows, "ours", f"ours, {name.lower()} at full scale (n = {n})", BLUE, marker, line)
    for (preset, name), rows in ran[ran["preset"] != "paper"].groupby(["preset", "family"], sort=False):
        n = ", ".join(str(k) for k in rows["n"])
        label = f"ours, {name} at smaller scale: {preset} (n = {n}), not comparable"
        drawn(axis, rows, "ours", label, GREY, {"smoke": "x", "teach": "+"}.get(preset, "*"), "none")
    axis.set_xscale("log", base=2)
    ticks = sorted({*frame["epsilon"]})
    axis.set_xticks(ticks, [f"{e:g}" for e in ticks])
    axis.minorticks_off()
    axis.set(xlabel="epsilon (less is more private)", ylabel="test accuracy (%)", title=title)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center")
    return figure


def drawn(
    axis, rows, column: str, label: str, colour: str, marker: str, line: str, hollow: bool = False
) -> None:
    """Draws one series of a table, with its spread."""
    means, spreads = zip(*map(number, rows[column]), strict=True)
    axis.errorbar(
        rows["epsilon"].astype(float), means, yerr=spreads, label=label, color=colour, marker=marker, linestyle=line,
        capsize=2, markerfacecolor="none" if line == "none" else "white" if hollow else colour, zorder=4 if line == "none" else 3,
        markersize=9 if line == "none" else 7,
    )  # fmt: skip


def beside(frame, prefix: str, title: str) -> Figure:
    """Plots rows of a table as bars, with the published number of each as a hollow diamond.

    Args:
      frame: from `dpnb.results.table`, rows that have runs.
      prefix: of the names, left out.
      title: above the figure.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(frame) + 1.6), layout="constrained")
    for place, row in enumerate(frame.itertuples()):
        mean, deviation = number(row.ours)
        axis.barh(
            place, mean, xerr=deviation, color=BLUE, height=0.62, hatch="" if row.preset == "paper" else "///",
            edgecolor="white", label=f"ours, preset {row.preset} (mean, std)" if place == 0 else None,
        )  # fmt: skip
        axis.text(mean - 3, place, f"{row.ours.replace('+-', '±')}  n = {row.n}", va="center", ha="right", fontsize=8,
                  bbox=dict(facecolor="white", edgecolor="none", pad=1.2))  # fmt: skip
    flagged = frame["paper"].str.contains("unverified").to_numpy()
    for which, marker, label in (
        (~flagged & (frame["paper"] != "-"), "D", "paper, full scale: a larger network, not comparable"),
        (flagged, "s", "the same, unverified"),
    ):
        places = np.flatnonzero(which)
        if len(places):
            means, spreads = zip(*(number(frame["paper"].iloc[p]) for p in places), strict=True)
            axis.errorbar(
                means, places, xerr=spreads, fmt=marker, color=ORANGE, markerfacecolor="white", label=label
            )
    axis.set_yticks(range(len(frame)), [name.removeprefix(prefix) for name in frame["experiment"]])
    axis.set_ylim(len(frame) - 0.4, -0.6)
    axis.set(xlabel="test accuracy (%)", xlim=(0, 100), title=title)
    axis.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, loc="outside lower center")
    return figure


def published(frame, title: str) -> Figure:
    """Plots the published numbers of a table, marked by whether they can be run; and ours at that scale, if any.

    Args:
      frame: from `dpnb.results.table`.
      title: above the figure.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 0.36 * len(frame) + 1.4), layout="constrained")
    impossible = frame["status"].str.startswith("impossible").to_numpy()
    for which, colour, marker, label in (
        (~impossible & (frame["paper"] != "-"), ORANGE, "D", "paper, can be run in public"),
        (impossible, GREY, "X", "paper, impossible in public (JFT-300M)"),
        (frame["n"] != "-", BLUE, "o", "ours"),
    ):
        cells = frame["ours" if label == "ours" else "paper"]
        places = np.flatnonzero(which)
        if len(places):
            means = [number(cells.iloc[p])[0] for p in places]
            axis.plot(means, places, marker, color=colour, label=label, markersize=7)
            for place, mean in zip(places, means, strict=True):
                flag = " *" if "unverified" in cells.iloc[place] else ""
                axis.text(mean + 2.5, place, f"{mean:.1f}{flag}", va="center", fontsize=8)
    names = frame["experiment"].str.replace("imagenet/", "").str.replace("finetune/", "")
    axis.set_yticks(range(len(frame)), names)
    axis.set_ylim(len(frame) - 0.4, -0.6)
    axis.set(xlabel="validation accuracy, top 1 (%); * unverified", xlim=(0, 100), title=title)
    axis.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, loc="outside lower center")
    return figure


def over_updates(curves: dict[str, list[dict]]) -> Figure:
    """Plots the test accuracy of the averaged parameters over the updates.

    Args:
      curves: {label of a run: its record's "curve"}.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    for i, (label, points) in enumerate(curves.items()):
        steps, accuracies = [p["step"] for p in points], [p["ema_accuracy"] for p in points]
        axis.plot(steps, accuracies, marker="osD^v"[i % 5], color=PALETTE[i % 5], label=label, markersize=5)
    axis.set(xlabel="update", ylabel="test accuracy, EMA (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
