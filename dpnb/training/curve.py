"""The points of the training curve, and the epsilon spent there."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dpnb import privacy
from dpnb.experiments import Experiment
from dpnb.training.evaluation import Evaluation
from dpnb.training.sharding import fetch_replicated
from dpnb.training.state import BatchMetrics


def curve_point(step: int, seen: BatchMetrics, epsilon: float) -> dict[str, Any]:
    """Makes one point of the curve. All but step and epsilon are training statistics and not private."""
    seen = BatchMetrics(*[float(fetch_replicated(x)) for x in seen])
    n, finite = max(seen.examples, 1.0), seen.examples - seen.nonfinite
    return {
        "step": step,
        "epsilon": epsilon,
        "batch_size": int(seen.examples),
        "train_loss": seen.loss / max(finite, 1.0) if finite or not seen.examples else math.nan,
        "train_accuracy": 100 * seen.correct / n,
        "mean_norm": seen.norm / n,
        "clipped_fraction": seen.clipped / n,
        "nonfinite": int(seen.nonfinite),
        "unreadable": int(seen.unreadable),
    }


def accuracies(evaluated: dict[str, Evaluation]) -> dict[str, float]:
    """Returns what a point of the curve keeps of evaluations of "raw" and "ema" parameters, in percent."""
    return {f"{name}_accuracy": found.accuracy for name, found in evaluated.items()}


def accounting_grid(steps: int, points: int = 8) -> list[int]:
    """Returns numbers of updates at which to compute epsilon for plots and progress, the last included."""
    return [int(n) for n in np.unique(np.linspace(1, steps, points).astype(int))]


def epsilon_spent(mechanism: privacy.Mechanism, experiment: Experiment) -> Callable[[int], float]:
    """Returns a cheap function (number of charged steps) -> epsilon, which is never below the true one.

    Steps that were charged twice count twice. The function is exact at the points of the curve, or at eight
    points if these are more than 30; in between it gives the epsilon of the next one, and beyond the
    experiment's steps that of the budget. It gives NaN if the accountant is not installed.
    """
    every = experiment.eval_every or experiment.steps
    before_end = range(every, experiment.steps, every)
    grid = [*before_end, experiment.steps] if len(before_end) < 30 else accounting_grid(experiment.steps)
    try:
        curve = privacy.epsilon_curve(mechanism, grid, experiment.delta, experiment.accountant)
    except privacy.MissingAccountant:
        return lambda step: math.nan
    curve = [*curve, experiment.epsilon]
    return lambda charged: float(curve[np.searchsorted(grid, charged)])
