"""What notebooks share, so that each begins with its subject: looks, exercises, sliders, data that may be missing.

Nothing here is needed by the library itself, or by a program that uses it.
"""

from dpnb.notebook.exercises import check
from dpnb.notebook.loading import fetch, or_embedded
from dpnb.notebook.looks import BLUE, GREEN, GREY, ORANGE, RED, lecture_style, sharp_figures
from dpnb.notebook.showing import explore, show_records, source

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "RED", "check", "explore", "fetch", "lecture_style", "or_embedded",
    "sharp_figures", "show_records", "source",
]  # fmt: skip
