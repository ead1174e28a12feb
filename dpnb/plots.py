"""Figures from result records and data; every axis has a label and a unit."""

import itertools
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dpnb import results

# What tells series apart where colours do not.
MARKERS = "osv^D<>Pp*hX8d"
LINES = ("-", "--", "-.", ":")


def curve(result: dict[str, Any]) -> Figure:
    """Plots test accuracy and training loss over updates.

    Args:
      result: a record, as `dpnb.results.record` makes it.
    """
    points = result["curve"]
    steps = [p["step"] for p in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(steps, [p["ema_accuracy"] for p in points], "o-", label="averaged parameters (EMA)")
    left.plot(steps, [p["raw_accuracy"] for p in points], "s--", label="last parameters")
    paper = result["paper"]["mean"]
    if paper is not None:
        label = f"paper, full scale: {paper} %"
        left.axhline(paper, color="grey", linestyle=":", label=label)
    left.set(xlabel="update", ylabel="test accuracy (%)", title="Accuracy during training")
    left.legend()
    right.plot(steps, [p["train_loss"] for p in points], "o-", color="C2")
    right.set(xlabel="update", ylabel="training loss (nats)", title="Training loss (not private)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def budget(spent: dict[str, tuple[list[int], list[float]]], target: float | None) -> Figure:
    """Plots how epsilon is spent over the updates, one line per accountant.

    Args:
      spent: {"PLD": (steps, epsilons), "RDP": ...}.
      target: the stated epsilon, None for infinity.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for (name, (steps, epsilons)), look in zip(spent.items(), itertools.cycle(LINES)):
        axis.plot(steps, epsilons, look, linewidth=2, label=f"spent, {name} accountant")
    if target is not None:
        axis.axhline(target, color="grey", linestyle=":", label=f"budget: epsilon = {target:g}")
    axis.set(xlabel="update", ylabel="epsilon", title="How the privacy budget is spent", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def views(images: np.ndarray, titles: list[str], first: str = "original") -> Figure:
    """Shows rows of small pictures: the original first, then its K views.

    Args:
      images: uint8 [examples, 1 + K, h, w, 3].
      titles: one per example.
      first: title of the first column.
    """
    rows, columns = images.shape[:2]
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.1 * columns, 1.25 * rows), layout="constrained", squeeze=False
    )
    for r in range(rows):
        for c in range(columns):
            axes[r, c].imshow(images[r, c])
            axes[r, c].set(xticks=[], yticks=[])
            axes[0, c].set_title(first if c == 0 else f"view {c}", fontsize=8)
        axes[r, 0].set_ylabel(titles[r], fontsize=8)
    return figure


def gallery(images: np.ndarray, titles: tuple[str, ...]) -> Figure:
    """Shows columns of small pictures without gaps.

    Args:
      images: uint8 [rows, columns, h, w, 3].
      titles: one per column.
    """
    rows, columns, height, width, _ = images.shape
    whole = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    figure, axis = plt.subplots(figsize=(0.8 * columns, 0.8 * rows + 0.3), layout="constrained")
    axis.imshow(whole)
    axis.set_xticks(width * (np.arange(columns) + 0.5), titles)
    axis.set_yticks([])
    axis.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    return figure


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """Plots the confusion matrix in percent of each true class.

    Args:
      labels, predictions: int [n].
      classes: their names.
    """
    n = len(classes)
    counts = np.zeros((n, n))
    np.add.at(counts, (labels, predictions), 1)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
    shown = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, label="share of the true class (%)")
    axis.set(
        xticks=range(n), yticks=range(n), yticklabels=classes, xlabel="predicted class",
        ylabel="true class", title="Confusion matrix, averaged parameters",
    )  # fmt: skip
    axis.set_xticks(range(n), classes, rotation=45, ha="right")
    if n <= 20:
        for i in range(n):
            for j in range(n):
                colour = "white" if percent[i, j] > 50 else "black"
                axis.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def bars(
    frame, title: str, reference: dict[str, float] | None = None, whose: str = "others, full scale"
) -> Figure | None:
    """Plots one bar per cell of a study, with its standard deviation if there are several runs.

    Args:
      frame: from `dpnb.results.summary`; cells without runs are listed without a bar.
      title: above the figure, over a line that says the scale.
      reference: values of others to mark, {cell: accuracy in percent}.
      whose: their label in the legend.
    Returns:
      None if no cell has runs.
    """
    if not frame["n"].sum():
        return None
    ran = frame[frame["n"] > 0]
    varied = bool(ran[["B", "T", "K"]].nunique().max() > 1)  # then each bar states its own
    scales = [
        f"\nB {b:,}, T {t:,}, K {k}" * varied
        for b, t, k in zip(frame["B"], frame["T"], frame["K"], strict=True)
    ]
    figure, axis = plt.subplots(
        figsize=(8, (0.6 if varied else 0.5) * len(frame) + 1.9), layout="constrained"
    )
    places = np.arange(len(frame))
    axis.barh(places, frame["ema"], xerr=frame["ema_std"], color="C0", alpha=0.8, label="ours (mean, std)")
    for place, (_, row) in zip(places, frame.iterrows(), strict=True):
        text = f"{row['ema']:.1f} (n = {row['n']})" if row["n"] else "not run at this scale"
        end = np.nansum([row["ema"], row["ema_std"]]) if row["n"] else 0
        axis.text(end + 1, place, text, va="center", fontsize=8)
    if reference:
        known = [(p, reference[c]) for p, c in zip(places, frame["cell"], strict=True) if c in reference]
        axis.plot([v for _, v in known], [p for p, _ in known], "kD", label=whose)
    axis.set_yticks(
        places, [cell + scale for cell, scale in zip(frame["cell"], scales, strict=True)], fontsize=8
    )
    axis.set_xticks(range(0, 101, 10))
    axis.set_ylim(len(frame) - 0.4, -0.6)  # downwards, with room for the last cell even without a bar
    right = np.nanmax([0, *(frame["ema"] + frame["ema_std"].fillna(0)), *(reference or {}).values()])
    axis.set(xlabel="test accuracy (%)", xlim=(0, 1.2 * right or 1))
    axis.set_title(f"{title}\n{results.scale(ran)}", fontsize=10)
    axis.grid(alpha=0.3, axis="x")
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def lines(
    groups: dict[str, Any], x: str, xlabel: str, title: str, spacing: str = "log", ticks: bool = True
) -> Figure | None:
    """Plots accuracy against one quantity, one line per group; the legend states its scale and runs.

    Args:
      groups: {label: frame of `dpnb.results.summary` with a column `x`}. Cells of a group with the same
        x are one experiment at that scale, and are drawn once.
      x: that column.
      xlabel, title: of the axis, with its unit, and of the figure.
      spacing: of the horizontal axis: "log" (base 2), "linear", or "equal" (one step from value to value).
      ticks: one at every value; False leaves them to matplotlib ("log" and "linear").
    Returns:
      None if no group has runs.
    """
    shown = {label: frame[frame["n"] > 0].drop_duplicates(x) for label, frame in groups.items()}
    shown = {label: frame for label, frame in shown.items() if len(frame)}
    if not shown:
        return None
    values = sorted({v for frame in shown.values() for v in frame[x]})
    places = {v: i if spacing == "equal" else v for i, v in enumerate(values)}
    figure, axis = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    for (label, frame), marker, look in zip(shown.items(), MARKERS, itertools.cycle(LINES)):
        axis.errorbar(
            frame[x].map(places), frame["ema"], yerr=frame["ema_std"].fillna(0), fmt=marker + look, capsize=3,
            label=f"{label}: {results.scale(frame)}; {results.counts(frame)}",
        )  # fmt: skip
    if spacing == "log":
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    if ticks or spacing == "equal":
        axis.set_xticks([places[v] for v in values], [f"{v:g}" for v in values])
        axis.minorticks_off()
    low, high = axis.get_ylim()
    wider = max(0.0, 10 - (high - low)) / 2  # at least 10 points high: less would magnify noise
    axis.set(xlabel=xlabel, ylabel="test accuracy, averaged parameters (%)", title=title)
    axis.set_ylim(low - wider, high + wider)
    axis.grid(alpha=0.3)
    note = _small_print(axis, "bars: standard deviation over n runs")
    figure.legend(fontsize=8, loc="outside lower center", title=note, title_fontsize=7.5)
    return figure


def _small_print(axis, said: str) -> str:
    """Adds where the vertical axis (%) starts to a text, if that is not at 0."""
    low = axis.get_ylim()[0]
    return said + (f"; the vertical axis starts at {low:.0f} %, not at 0" if low > 0 else "")


def grid(frame, rows: str, columns: str, title: str) -> Figure:
    """Plots accuracy over two quantities, as a coloured table with the number of runs.

    Args:
      frame: from `dpnb.results.summary`, with two further columns `rows` and `columns`; cells that agree
        in both are one experiment at that scale.
      title: above the figure, over a line that says the scale.
    """
    frame = frame.drop_duplicates([rows, columns])
    table = frame.pivot(index=rows, columns=columns, values="ema")
    runs = frame.pivot(index=rows, columns=columns, values="n").to_numpy()
    figure, axis = plt.subplots(
        figsize=(1.3 * len(table.columns) + 2.5, 0.7 * len(table) + 1.6), layout="constrained"
    )
    shown = axis.imshow(table, cmap="viridis")
    figure.colorbar(shown, label="test accuracy (%)")
    middle = np.nanmean(table.to_numpy()) if np.isfinite(table.to_numpy()).any() else 0
    for i, values in enumerate(table.to_numpy()):
        for j, value in enumerate(values):
            text = f"{value:.1f}\nn = {runs[i, j]}" if np.isfinite(value) else "-"
            colour = "black" if value > middle else "white"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(table.columns)), [f"{v:g}" for v in table.columns])
    axis.set_yticks(range(len(table)), [f"{v:g}" for v in table.index])
    axis.set(xlabel=columns.replace("_", " "), ylabel=rows.replace("_", " "))
    axis.set_title(f"{title}\n{results.scale(frame)}", fontsize=10)
    return figure


def price_of_privacy(frame, title: str) -> Figure:
    """Plots test accuracy against epsilon, beside that of the same training without privacy.

    Args:
      frame: from `dpnb.results.summary`, of cells that differ in their budget; those without runs are left out.
      title: above the figure.
    """
    ran = frame[frame["n"] > 0].sort_values("epsilon")
    private, free = ran[np.isfinite(ran["epsilon"])], ran[~np.isfinite(ran["epsilon"])]
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for accuracy in free["ema"]:
        axis.axhline(accuracy, color="C0", linestyle="--", label=f"not private: {accuracy:.1f} %")
    axis.errorbar(
        private["epsilon"], private["ema"], yerr=private["ema_std"].fillna(0), fmt="ko-", capsize=3,
        linewidth=2, label="private (bars: standard deviation over runs)",
    )  # fmt: skip
    for epsilon, accuracy in zip(private["epsilon"], private["ema"], strict=True):
        axis.annotate(f"{accuracy:.1f} %", (epsilon, accuracy), (8, -14), textcoords="offset points")
    axis.set_xscale("log", base=2)
    axis.set_xticks(private["epsilon"], [f"{epsilon:.3g}" for epsilon in private["epsilon"]])
    axis.minorticks_off()
    lowest = 10 * max(0, (ran["ema"] - ran["ema_std"].fillna(0)).min() // 10 - 1)
    axis.set(
        xlabel="epsilon (less is more private)", ylabel="test accuracy (%)", ylim=(lowest, 101), title=title
    )
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", title=f"runs of each: {results.counts(ran).removeprefix('n = ')}")
    return figure


def accuracy_epsilon(series: dict[str, list[tuple[float, float, float | None]]], title: str) -> Figure:
    """Plots test accuracy against epsilon.

    Args:
      series: {label: [(epsilon, accuracy in percent, standard deviation or None), ...]}, as
        `dpnb.results.series` makes it. Labels that begin with "ours" are drawn black, filled and thick,
        the others thin and hollow on top of them; no two series share colour, line and marker.
      title: of the figure.
    """
    figure, axis = plt.subplots(figsize=(12, 6.5), layout="constrained")
    others = 0
    for i, (label, points) in enumerate(series.items()):
        epsilons, accuracies, spreads = zip(*sorted(points, key=lambda p: p[0]), strict=True)
        ours = label.startswith("ours")
        hue = plt.get_cmap("tab10")(others % 10)  # after ten the same again, with another line and marker
        colour, line = ("black", "-") if ours else (hue, ("--", ":", "-.")[others // 10 % 3])
        axis.errorbar(
            epsilons, accuracies, yerr=[s or 0 for s in spreads], label=label, capsize=2,
            color=colour, linestyle=line, marker=MARKERS[i % len(MARKERS)], zorder=2 if ours else 3,
            linewidth=2.5 if ours else 1, markersize=6 if ours else 7,
            markerfacecolor=colour if ours else "white",
        )  # fmt: skip
        others += not ours
    most = max((p[0] for points in series.values() for p in points), default=8)
    ticks = [1, 2, 3, 4, 6, 8, *([10] if most >= 10 else [])]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.set(xlabel="epsilon (at delta = 1e-5)", ylabel="CIFAR-10 test accuracy (%)", title=title)
    axis.grid(alpha=0.3)
    note = _small_print(axis, "bars: standard deviation over runs, where known")
    note = note.replace("; ", ";\n")  # a legend is as wide as its title
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), title=note, title_fontsize=9)
    return figure
