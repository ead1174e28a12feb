"""Shows what a notebook cannot print: the library's own lines, pictures with sliders, tables of records."""

import inspect
from collections.abc import Callable
from typing import Any

from IPython import get_ipython
from IPython.display import Markdown, display

from dpnb import folders, results


def source(*functions: Callable) -> None:
    """Displays the lines of functions of the library."""
    code = "\n".join(inspect.cleandoc("\n" + inspect.getsource(f)) for f in functions)
    display(Markdown(f"```python\n{code}\n```"))


def explore(draw: Callable, **choices: list) -> None:
    """Draws a picture at its own defaults, and, where somebody is there to move them, once more with sliders.

    The first picture is a plain output of the cell: what a slider draws is lost when the notebook is saved.

    Args:
      draw: makes and shows a figure; its parameters have defaults.
      choices: the values that the slider of a parameter offers.
    """
    draw()
    if not _live():
        return
    import ipywidgets

    defaults = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
    sliders = {
        name: ipywidgets.SelectionSlider(options=options, value=defaults[name], continuous_update=False)
        for name, options in choices.items()
    }
    print("The same, at values of your choice:")
    ipywidgets.interact(draw, **sliders)


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
