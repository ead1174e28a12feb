"""`dpnb.notebook`, what notebooks share, by itself."""

import types

import pytest
from answers import ANSWERS

from dpnb import folders, notebook
from dpnb.notebook import colab, exercises, showing


def said(capsys, *given, **more):
    notebook.check(*given, **more)
    return capsys.readouterr().out.strip()


def test_every_exercise_of_the_lectures_is_there_and_no_other():
    numbers = {f"{name[:2]}.{number}" for name, of_lecture in ANSWERS.items() for number in of_lecture}
    assert exercises.EXERCISES.keys() == numbers and len(numbers) == 21


def test_no_answer_is_no_wrong_answer(capsys):
    """The ellipsis that stands for it, or a function that still returns it."""
    assert said(capsys, "02.3", ...) == "no answer yet"
    assert said(capsys, "01.2", lambda sigma: ...) == "no answer yet"


def test_a_check_never_raises(capsys):
    """It shows what the answer raised, and gives the hint all the same."""
    told = said(capsys, "01.2", lambda sigma: 1 / 0)
    assert told.startswith("not yet. Hint: right if noise") and "ZeroDivisionError" in told
    assert "TypeError" in said(capsys, "02.4", 3, q=0.1)
    assert said(capsys, "01.3", object()).startswith("not yet. Hint: a: subtract")


def test_a_hint_fits_the_answer(capsys):
    told = said(capsys, "01.3", {"a", "c", "d"})
    assert "d: are the test images" in told and "e: on which data" in told and "a: subtract" not in told


def test_a_study_without_records_says_where_it_looked(capsys, tmp_path):
    notebook.show_records({}, tmp_path)
    told = capsys.readouterr().out
    assert str(tmp_path) in told and str(folders.RECORDS) in told and "nothing to show" in told


def test_without_somebody_to_move_sliders_a_picture_is_drawn_once():
    drawn = []
    notebook.explore(lambda sigma=1.0: drawn.append(sigma), sigma=[0.5, 1.0])
    assert drawn == [1.0] and not showing._live()


def test_the_lines_of_a_function_are_displayed(monkeypatch):
    shown = []
    monkeypatch.setattr(showing, "display", shown.append)
    notebook.source(colab.untested)
    assert shown[0].data.startswith("```python\ndef untested()")


@pytest.mark.parametrize("version, outside", [("0.7.2", True), ("0.11.0", False), ("0.99", True)])
def test_a_version_outside_what_is_tested_is_named(version, outside, monkeypatch):
    """As on an older or newer machine of Colab, whose JAX stays as it is."""
    fake = types.SimpleNamespace(
        requires=lambda name: ["jax<0.12,>=0.10", 'pytest>=8; extra == "test"'], version=lambda name: version,
        PackageNotFoundError=LookupError,
    )  # fmt: skip
    monkeypatch.setattr(colab.importlib, "metadata", fake)
    assert colab.untested() == [f"jax {version} is here, and dpnb is tested with <0.12,>=0.10"] * outside


def test_runs_that_are_lost_with_the_machine(capsys, monkeypatch):
    """A notebook with runs says so, and how to keep them; a lecture, which has none, does not."""
    monkeypatch.setattr(colab, "untested", list)
    colab.begin("")
    assert "lost with this machine" in (told := capsys.readouterr().out) and "/content/drive/MyDrive" in told
    colab.begin(None)
    assert not capsys.readouterr().out
