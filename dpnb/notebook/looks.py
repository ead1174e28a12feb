"""How figures of notebooks look: sharp on every screen, and told apart by readers who see no colours."""

from matplotlib import pyplot as plt

# A palette that colour-blind readers can tell apart; lines differ in style and marker too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
LECTURE = {
    "figure.figsize": (6, 3.6),
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def sharp_figures() -> None:
    """Has the notebook keep figures at twice the resolution at which it shows them; outside of one it does nothing."""
    from IPython import get_ipython

    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def lecture_style() -> None:
    """Sets sharp figures, and the size, grid and legend of those of a lecture."""
    sharp_figures()
    plt.rcParams.update(LECTURE)
