"""Every axis says what it shows and in which unit."""

import matplotlib
import numpy as np
import pandas
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


def summary(**columns):
    """What `dpnb.results.summary` gives for K = 0, 1, 2 and, at this scale the same as 2, K = 4."""
    known = dict(
        cell=["k0", "k1", "k2", "k4"], network=["WRN-10-1"] * 4, B=[512] * 4, T=[77] * 4, K=[0, 1, 2, 2],
        ema=[37.0, 36.0, 38.0, 38.0], ema_std=[2.0, 1.0, np.nan, np.nan], n=[3, 3, 1, 1],
    )  # fmt: skip
    return pandas.DataFrame({**known, **columns})


def said(figure):
    """The entries and the small print of the legends of a figure."""
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return [t.get_text() for legend in legends for t in (legend.get_title(), *legend.get_texts())]


def test_lines_say_scale_runs_and_where_the_axis_starts():
    figure = plots.lines(
        {"ours": summary(), "empty": summary(n=0)}, "K", "K, views", "Views", spacing="equal"
    )
    (axis,) = figure.axes
    assert labels(figure) == ["K, views", "test accuracy, averaged parameters (%)"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "1", "2"]  # no number that is not there
    assert list(axis.get_xticks()) == list(axis.lines[0].get_xdata()) == [0, 1, 2]
    note, entry = said(figure)
    assert entry == "ours: WRN-10-1, B 512, T 77, K 0 to 2; n = 3, 3, 1"
    assert f"starts at {axis.get_ylim()[0]:.0f} %, not at 0" in note and "standard deviation" in note
    assert plots.lines({"empty": summary(n=0)}, "K", "K", "Views") is None


def test_lines_from_zero_say_nothing_of_it():
    figure = plots.lines({"ours": summary(ema=[0.0, 1.0, 2.0, 2.0])}, "K", "K", "Views", spacing="linear")
    assert "not at 0" not in " ".join(said(figure))


def test_bars_and_grid_say_scale_and_runs():
    figure = plots.bars(summary(), "Views", {"k1": 70.0}, "others: WRN-16-4")
    (axis,) = figure.axes
    assert axis.get_title() == "Views\nWRN-10-1, B 512, T 77, K 0 to 2" and axis.get_xlim()[0] == 0
    assert "others: WRN-16-4" in said(figure) and "37.0 (n = 3)" in [t.get_text() for t in axis.texts]
    assert plots.bars(summary(n=0), "Views") is None
    some = plots.bars(summary(n=[0, 3, 0, 0]), "Views").axes[0]
    assert some.get_title().endswith("K 1")  # the scale of what ran
    assert [t.get_text() for t in some.texts].count("not run at this scale") == 3
    cells = summary(learning_rate=[1.0, 1.0, 2.0, 2.0], clip_norm=[0.1, 1.0, 0.1, 1.0])
    axis = plots.grid(cells, "learning_rate", "clip_norm", "Both").axes[0]
    assert [t.get_text() for t in axis.texts][:2] == ["37.0\nn = 3", "36.0\nn = 3"]
    assert "WRN-10-1, B 512" in axis.get_title()


def test_accuracy_against_epsilon_can_be_told_apart():
    series = {f"other {i}": [(1.0, 50.0 + i, None), (4.0, 60.0 + i, 0.5)] for i in range(25)}
    series = {"ours: a": [(3.0, 60.0, 1.0)], "ours: b": [(10.0, 40.0, None)], **series}
    figure = plots.accuracy_epsilon(series, "All")
    (axis,) = figure.axes
    drawn = [c.lines[0] for c in axis.containers]
    styles = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn]
    assert len({*styles}) == len(series) and styles[0][0] == styles[1][0] == "black"
    assert "black" not in {colour for colour, _, _ in styles[2:]}
    assert min(line.get_linewidth() for line in drawn[:2]) > max(line.get_linewidth() for line in drawn[2:])
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "2", "3", "4", "6", "8", "10"]
    assert said(figure)[1:] == list(series) and "not at 0" in said(figure)[0]


def test_gallery_keeps_every_picture_in_its_place():
    images = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1) + np.zeros((2, 3, 4, 5, 3), np.uint8)
    (axis,) = plots.gallery(images, ("a", "b", "c")).axes
    whole = np.asarray(axis.images[0].get_array())
    assert whole.shape == (8, 15, 3) and (whole[4:, 10:] == 5).all() and (whole[:4, 5:10] == 1).all()
    assert [t.get_text() for t in axis.get_xticklabels()] == ["a", "b", "c"]


def test_price_of_privacy():
    frame = pandas.DataFrame(
        {
            "epsilon": [8.0, 1.0, np.inf, 3.0],
            "ema": [95.0, 85.0, 97.0, np.nan],
            "ema_std": [0.5, np.nan, 0.1, np.nan],
            "n": [2, 1, 2, 0],
        }
    )
    figure = plots.price_of_privacy(frame, "digits")
    assert labels(figure) == ["epsilon (less is more private)", "test accuracy (%)"]
    (axis,) = figure.axes
    free, private = axis.lines[:2]
    assert list(free.get_ydata()) == [97, 97] and list(private.get_ydata()) == [85, 95]
    assert [t.get_text() for t in axis.texts] == ["85.0 %", "95.0 %"]
    assert axis.get_legend().get_title().get_text() == "runs of each: 1, 2, 2"
