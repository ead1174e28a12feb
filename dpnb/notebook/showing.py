"""Shows what a notebook cannot print: the library's own lines, pictures with sliders, tables of records."""

import inspect
from collections.abc import Callable
from typing import Any

from IPython import get_ipython
from IPython.display import Markdown, display

from dpnb import folders, results

SYMBOLS = {"sigma": "σ", "epsilon": "ε", "batch": "batch B", "updates": "updates T"}


def source(*functions: Callable) -> None:
    """Displays the lines of functions of the library."""
    code = "\n".join(inspect.cleandoc("\n" + inspect.getsource(f)) for f in functions)
    display(Markdown(f"```python\n{code}\n```"))


def explore(draw: Callable, **choices: list) -> None:
    """Draws a picture at its own defaults, and, where somebody is there to move them, has sliders that draw it once more.

    The first picture is a plain output of the cell, for what a slider draws is lost when the notebook is saved.

    Args:
      draw: makes and shows a figure; its parameters have defaults.
      choices: the values that the slider of a parameter offers.
    """
    draw()
    if not _live():
        return
    import ipywidgets

    defaults = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
    look = {"layout": {"width": "30em"}, "style": {"description_width": "6em"}, "continuous_update": False}
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=options, value=defaults[name], description=SYMBOLS.get(name, name), **look
        )
        for name, options in choices.items()
    }
    below = ipywidgets.Output()

    def redraw(_):
        with below:
            below.clear_output(wait=True)
            draw(**{name: slider.value for name, slider in sliders.items()})

    for slider in sliders.values():
        slider.observe(redraw, "value")
    print("Move a slider, and the same is drawn below at your values:")
    display(ipywidgets.VBox([*sliders.values(), below]))


def _live() -> bool:
    """Returns whether there are sliders, and somebody to move them."""
    try:
        import ipywidgets  # noqa: F401

        # Batch execution (papermill, nbclient) has nobody who could type, and says so in every request.
        return get_ipython().kernel.get_parent("shell")["content"]["allow_stdin"]
    except Exception:
        return False


def show_records(frames: dict[str, Any], output) -> None:
    """Displays the table of each scale of a study, or says where records were looked for.

    Args:
      frames: from `dpnb.sweep.on_record`.
      output: the directory of runs.
    """
    if not frames:
        print(f"no runs of these cells are on record below {output} or {folders.RECORDS}: nothing to show")
    for scale, frame in frames.items():
        display(Markdown(f"**{scale}**\n\n{results.study(frame)}"))
