"""The training curve: one point of it, and how much of the budget is spent there."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dpnb import privacy
from dpnb.experiments.experiment import Experiment
from dpnb.training.sharding import fetch_replicated
from dpnb.training.state import BatchMetrics


def curve_point(step: int, seen: BatchMetrics, epsilon: float) -> dict[str, Any]:
    """One point of the curve. All but step and epsilon are training statistics, not private."""
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


def accounting_grid(steps: int, points: int = 8) -> list[int]:
    """Numbers of updates at which epsilon is computed for plots and progress, the last included."""
    return [int(n) for n in np.unique(np.linspace(1, steps, points).astype(int))]


def epsilon_spent(mechanism: privacy.Mechanism, experiment: Experiment) -> Callable[[int], float]:
    """A cheap function of the number of steps, those charged twice counted twice -> epsilon, never below the true one.

    Exact at the points of the curve (up to 30 of them); between two, the later one's epsilon is given; and
    that of the budget where steps were charged twice, so that there are more than the experiment's.
    """
    every = experiment.eval_every or experiment.steps
    grid = [*range(every, experiment.steps, every), experiment.steps]
    grid = grid if len(grid) <= 30 else accounting_grid(experiment.steps)
    try:
        curve = privacy.epsilon_curve(mechanism, grid, experiment.delta, experiment.accountant)
    except privacy.MissingAccountant:
        return lambda step: math.nan
    curve = [*curve, experiment.epsilon]
    return lambda charged: float(curve[np.searchsorted(grid, charged)])
