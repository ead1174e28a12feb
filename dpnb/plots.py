"""Figures from result records and data; every axis has a label and a unit."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def curve(result: dict[str, Any]) -> Figure:
    """Test accuracy and training loss over updates, epsilon on a second axis.

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
    return figure


def budget(spent: dict[str, tuple[list[int], list[float]]], target: float | None) -> Figure:
    """How epsilon is spent over the updates, one line per accountant.

    Args:
      spent: {"PLD": (steps, epsilons), "RDP": ...}.
      target: the stated epsilon, None for infinity.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, (steps, epsilons) in spent.items():
        axis.plot(steps, epsilons, label=f"spent, {name} accountant")
    if target is not None:
        axis.axhline(target, color="grey", linestyle=":", label=f"budget: epsilon = {target:g}")
    axis.set(xlabel="update", ylabel="epsilon", title="How the privacy budget is spent", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def views(images: np.ndarray, titles: list[str]) -> Figure:
    """Rows of small pictures: the original first, then its K views.

    Args:
      images: uint8 [examples, 1 + K, h, w, 3].
      titles: one per example.
    """
    rows, columns = images.shape[:2]
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.1 * columns, 1.25 * rows), layout="constrained", squeeze=False
    )
    for r in range(rows):
        for c in range(columns):
            axes[r, c].imshow(images[r, c])
            axes[r, c].set(xticks=[], yticks=[])
            axes[0, c].set_title("original" if c == 0 else f"view {c}", fontsize=8)
        axes[r, 0].set_ylabel(titles[r], fontsize=8)
    return figure


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """Confusion matrix in percent of each true class.

    Args:
      labels, predictions: int [n].
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
