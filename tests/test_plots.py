"""Every axis says what it shows and in which unit."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

from matplotlib import pyplot as plt

from dpnb import plots

POINTS = [
    {"step": s, "raw_accuracy": 10.0 + s, "ema_accuracy": 12.0 + s, "train_loss": 2 / s, "epsilon": s / 4}
    for s in (1, 2, 4)
]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def labels(figure):
    return [text for axis in figure.axes for text in (axis.get_xlabel(), axis.get_ylabel())]


@pytest.mark.parametrize("paper", [None, 79.5])
def test_curve(paper):
    figure = plots.curve({"curve": POINTS, "paper": {"mean": paper}})
    assert labels(figure) == ["update", "test accuracy (%)", "update", "training loss (nats)"]
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [13, 14, 16] and list(left.lines[1].get_ydata()) == [11, 12, 14]
    assert list(right.lines[0].get_xdata()) == [1, 2, 4]
    names = [text.get_text() for text in left.get_legend().get_texts()]
    assert len(names) == (2 if paper is None else 3) and any("EMA" in name for name in names)
    assert "not private" in right.get_title()


@pytest.mark.parametrize("target", [None, 8.0])
def test_budget(target):
    figure = plots.budget({"PLD": ([1, 2], [0.5, 0.8]), "RDP": ([1, 2], [0.7, 1.1])}, target)
    assert labels(figure) == ["update", "epsilon"]
    names = " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())
    assert "PLD" in names and "RDP" in names and ("epsilon = 8" in names) == (target is not None)


def test_confusion_is_in_percent_of_the_true_class():
    true, guessed = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 1, 1])
    figure = plots.confusion(true, guessed, ("cat", "dog", "never seen"))
    axis, bar = figure.axes
    assert [axis.get_xlabel(), axis.get_ylabel(), bar.get_ylabel()] == [
        "predicted class", "true class", "share of the true class (%)",
    ]  # fmt: skip
    np.testing.assert_array_equal(axis.images[0].get_array(), [[75, 25, 0], [0, 100, 0], [0, 0, 0]])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["cat", "dog", "never seen"]


@pytest.mark.parametrize("examples", [1, 3])
def test_views(examples):
    figure = plots.views(np.zeros((examples, 4, 8, 8, 3), np.uint8), ["cat"] * examples)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["original", "view 1", "view 2", "view 3"]
    assert all(axis.get_ylabel() == "cat" for axis in figure.axes[::4])
    assert not any(len(axis.get_xticks()) for axis in figure.axes)  # pictures have no scale to label
