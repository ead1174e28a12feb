"""Progress off a terminal: few plain lines, and an estimate that the first update does not spoil."""

import re
import types

import pytest

from dpnb.training import progress

POINT = {"batch_size": 100, "train_loss": 1.5, "train_accuracy": 40.0, "epsilon": 0.75}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    monkeypatch.setenv("DPNB_PROGRESS", "plain")
    return clock


def run(clock, bar, durations, **more):
    for seconds in durations:
        clock.now += seconds
        bar.show({**POINT, **more})


@pytest.mark.parametrize("total", [1, 3, 19, 39, 60, 1000, 2468])
def test_few_plain_lines(clock, capsys, total):
    with progress.Progress(total) as bar:
        run(clock, bar, [0.4] * total)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert 1 <= len(lines) <= 21 and "\r" not in out + err
    assert lines[-1].startswith(f"update {total}/{total} ")
    for said in ("loss 1.500", "train 40.0%", "epsilon at most 0.75", "examples/s", "time left"):
        assert said in lines[-1]


def test_a_fast_run_prints_no_more_than_a_line_a_second(clock, capsys):
    with progress.Progress(40) as bar:
        run(clock, bar, [0.1] * 40)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40", "30/40", "40/40"]


def test_a_slow_run_is_not_silent(clock, capsys):
    with progress.Progress(1000, seconds=60) as bar:
        run(clock, bar, [61] * 3)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_first_update_compiles_and_does_not_count(clock, capsys):
    with progress.Progress(20) as bar:
        run(clock, bar, [600.0] + [6.0] * 9)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("time left -") and "examples/s -" in first
    assert last.startswith("update 10/20 ") and last.endswith("time left 1.0 min")
    assert re.search(r"examples/s 17 ", last)  # 900 examples in 54 seconds


def test_a_resumed_run_counts_its_own_updates_only(clock, capsys):
    with progress.Progress(20, start=10) as bar:
        run(clock, bar, [600.0] + [12.0] * 4)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("update 15/20 ") and last.endswith("time left 1.0 min")


def test_last_accuracies_stay_on_show(clock, capsys):
    with progress.Progress(20) as bar:
        run(clock, bar, [1.0], raw_accuracy=51.23, ema_accuracy=49.0)
        run(clock, bar, [1.0])
    assert "raw 51.2%  ema 49.0%" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("choice", "expected"), [("bar", True), ("plain", False)])
def test_the_environment_decides(monkeypatch, choice, expected):
    monkeypatch.setenv("DPNB_PROGRESS", choice)
    assert progress.interactive() is expected


def test_a_pipe_gets_plain_lines(monkeypatch):
    monkeypatch.delenv("DPNB_PROGRESS", raising=False)
    monkeypatch.delitem(progress.sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(progress.sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    assert not progress.interactive()


def test_a_bar_where_somebody_watches(monkeypatch, capsys):
    monkeypatch.setenv("DPNB_PROGRESS", "bar")
    with progress.Progress(5) as bar:
        bar.show(POINT)
    out, err = capsys.readouterr()
    assert not out and "1/5" in err


def test_the_bar_too_leaves_out_the_first_update(monkeypatch, capsys):
    """Of a minute of compilation nothing is in the time left: twenty updates of a second each are seventeen more seconds."""
    monkeypatch.setenv("DPNB_PROGRESS", "bar")
    now = [1000.0]
    with progress.Progress(20) as bar:
        bar.bar._time = lambda: now[0]
        for seconds in (60.0, 1.0, 1.0):
            now[0] += seconds
            bar.show(POINT)
    lines = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert not any("<19:" in line for line in lines) and "3/20 [00:02<00:17" in lines[-1]
    assert "epsilon at most 0.75, " in lines[-1] and "<==" not in lines[-1]
