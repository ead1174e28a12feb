"""The command line: refuses in one line before it does anything, and leaves a record behind."""

import json
import math
import os
import re
import tomllib
import types

import nbformat
import numpy as np
import pytest
import shared_runs

from dpnb import cache, cli, experiments, folders, results, sweep
from dpnb.results import verification


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, to see that nothing is written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *arguments) -> str:
    """The one line that the command refuses with."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as error:  # argparse
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and not out
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", "  "))]
    assert len(lines) == 1
    return lines[0]


def test_list(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == experiments.names()
    assert "81.4 +- 0.2 %" in next(line for line in lines if line.startswith("cifar10/wrn-40-4/eps8"))
    assert cli.main(["list", "digits/*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_unknown_name_suggests(capsys, here):
    line = refusal(capsys, "run", "cifar10/wrn16-4/eps8")
    assert "cifar10/wrn16-4/eps8" in line and "did you mean cifar10/wrn-16-4/eps8" in line
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "learning_rat=4"], "learning_rat"),
        (["--set", "steps"], "KEY=VALUE"),
        (["--set", "steps=-3"], "steps must be a whole number in [1, 2147483647] or None, got -3"),
        (["--set", "steps=0.5"], "steps must be a whole number"),
        (["--set", "steps=many"], "steps must be a whole number in [1, 2147483647] or None, got 'many'"),
        (["--set", "eval_examples=0"], "eval_examples must be"),
        (["--set", "eval_every=-1"], "eval_every must be"),
        (["--set", "remat=yes"], "remat must be True or False, got 'yes'"),
        (["--set", "learning_rate=nan"], "learning_rate must be a number in [0, 1e+38], got 'nan'"),
        (["--set", "pretrained=None"], 'pretrained must be text, got None; "" for none'),
        (
            ["--set", "seed=1"],
            "--set must leave seed alone, got 'seed=1'; it is --seed N, --seeds N or --secret-seed",
        ),
        (["--set", "seed=None"], "--secret-seed"),
        (["--set", "preset=teach"], "--preset"),
        (["--set", "name=x"], "the first argument"),
        (["--set", "data_note=x"], "--data-note"),
        (["--seed", "-1"], "seed must be a whole number in [0, inf) or None, got -1"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--seeds", "-2"], "seeds must be at least 1, got -2"),
        (["--out", "x" * 270], "at most 255 bytes, got 270"),
        (["--seeds", "2", "--out", "x" * 270], "at most 255 bytes, got 270"),
        (["--out", "/dev/null/x"], "/dev/null"),
        (["--seeds", "2", "--out", "/dev/null/x"], "/dev/null"),
        (["--set", "sampler=poison"], "sampler"),
        (["--preset", "huge"], "huge"),
        (["--seed", "x"], "seed"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_bad_arguments_do_nothing(capsys, here, arguments, named):
    assert named in refusal(capsys, "run", "digits/wrn-10-1", *arguments)
    assert not list(here.iterdir())


def test_other_commands_refuse_too(capsys, here):
    assert "cifar11" in refusal(capsys, "table", "cifar11")
    assert "command" in refusal(capsys)
    nothing = here / "nothing"
    expected = f"dpnb: {nothing / 'result.json'}: No such file or directory"
    assert refusal(capsys, "verify", str(nothing)) == expected


def test_cells_that_nobody_outside_can_run_say_so(capsys, here):
    line = refusal(capsys, "run", "imagenet/finetune/nfnet-f3-jft/eps8", "--preset", "paper")
    assert "cannot be run in public" in line and "JFT-300M" in line
    assert not list(here.iterdir())


def test_an_installation_without_notebooks_says_so(capsys, here, monkeypatch):
    monkeypatch.setattr(folders, "NOTEBOOKS", here / "no notebooks")
    assert "install dpnb again" in refusal(capsys, "run", "digits/wrn-10-1")
    assert "install dpnb again" in refusal(capsys, "notebooks", str(here))
    assert not list(here.iterdir())


def test_notebooks_are_copied_but_never_over_a_file(capsys, here):
    (here / "nb").mkdir()
    (here / "nb" / "cifar10_table.ipynb").symlink_to(here / "nowhere")
    assert cli.main(["notebooks", "nb"]) == 0
    there = sorted(str(path.relative_to(folders.NOTEBOOKS)) for path in folders.NOTEBOOKS.rglob("*.ipynb"))
    assert capsys.readouterr().out.splitlines() == [
        f"notebooks copied to nb: {len(there) - 1}",
        "left alone, since they are there: nb/cifar10_table.ipynb",
    ]
    assert sorted(str(p.relative_to(here / "nb")) for p in (here / "nb").rglob("*.ipynb")) == there
    assert "learn/01_dp_sgd_by_hand.ipynb" in there and not (here / "nowhere").exists()
    for name in {*there} - {"cifar10_table.ipynb"}:
        assert (here / "nb" / name).read_bytes() == (folders.NOTEBOOKS / name).read_bytes()


def test_a_class_gets_lectures_without_solutions_and_with_them(capsys, here):
    assert cli.main(["notebooks", "nb", "--for-class"]) == 0
    names = [path.name for path in sorted((folders.NOTEBOOKS / "learn").glob("*.ipynb"))]
    for name in names:
        plain = (folders.NOTEBOOKS / "learn" / name).read_text()
        students, answers = (
            (here / "nb" / who / "learn" / name).read_text() for who in ("students", "answers")
        )
        assert plain.count('"solution"') >= 3 and "solutions = False" in plain
        assert not re.search(r'"solution"|solutions = |@title Solution|if solutions', students)
        assert students.count("yours here") == plain.count("yours here") >= 3
        assert answers.count('"solution"') == plain.count('"solution"') and "solutions = True" in answers
        cells = nbformat.reads(answers, 4).cells
        assert all(
            c.metadata == {"tags": ["solution"]} for c in cells if "solution" in c.metadata.get("tags", ())
        )
        assert "colab.research" not in students  # where a lecture has its solutions
        assert "source_hidden" in students  # set-up stays folded
    assert (here / "nb" / "students" / "demo.ipynb").read_bytes() == (
        folders.NOTEBOOKS / "demo.ipynb"
    ).read_bytes()
    capsys.readouterr()
    assert cli.main(["notebooks", "nb", "--for-class"]) == 0
    assert "copied to nb: 0\nleft alone" in capsys.readouterr().out


def test_runs_have_one_place(monkeypatch, tmp_path):
    """In the checkout, from anywhere inside it; else in the working directory: for notebooks and commands alike."""
    monkeypatch.setattr(folders, "INSTALLED", False)
    for place, runs in (
        (folders.ROOT, folders.ROOT / "runs"),
        (folders.ROOT / "docs", folders.ROOT / "runs"),
        (tmp_path, tmp_path / "runs"),
    ):
        monkeypatch.chdir(place)
        assert folders.runs().absolute() == runs
    monkeypatch.chdir(folders.ROOT / "docs")
    monkeypatch.setattr(folders, "INSTALLED", True)
    assert folders.runs().absolute() == folders.ROOT / "docs" / "runs"


def test_notebooks_need_folders_that_can_be_written(capsys, here):
    (here / "learn").touch()
    assert refusal(capsys, "notebooks", ".").startswith("dpnb: learn must be a folder that can be written (")
    assert [path.name for path in here.iterdir()] == ["learn"]


def test_version_is_that_of_pyproject(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    project = tomllib.loads((shared_runs.ROOT / "pyproject.toml").read_text())["project"]
    assert ended.value.code == 0 and capsys.readouterr().out == f"dpnb {project['version']}\n"


def test_records_are_those_of_the_working_directory_else_those_on_file(capsys, here):
    def ours():
        assert cli.main(["table", "cifar10"]) == 0
        return capsys.readouterr().out

    assert "reached, by our own way" in ours()
    (here / "results").mkdir()
    assert "reached, by our own way" not in ours()


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("steps=10", {"steps": 10}), ("learning_rate=0.5", {"learning_rate": 0.5}), ("steps=None", {"steps": None}),
        ("epsilon=inf", {"epsilon": math.inf}), ("sampler=shuffle", {"sampler": "shuffle"}),
        ("pretrained=a=b", {"pretrained": "a=b"}), ("delta=1e-6", {"delta": 1e-6}), ("remat=True", {"remat": True}),
        ("dataset=123", {"dataset": "123"}), ("dataset='123'", {"dataset": "123"}), ("pretrained=", {"pretrained": ""}),
        ("dataset=1or", {"dataset": "1or"}), ("pretrained=None", {"pretrained": None}),
    ],
)  # fmt: skip
def test_changes(pair, expected):
    made = cli.changes([pair])
    assert made == expected and type(*made.values()) is type(*expected.values())


def test_last_change_wins():
    assert cli.changes(["steps=1", "augmult=2", "steps=3"]) == {"steps": 3, "augmult": 2}


def test_table(capsys, here):
    assert cli.main(["table", "cifar10", "--results", str(here), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12 + 1 and "unverified" in lines[2]
    assert any("81.4 +- 0.2" in line for line in lines) and "| 67.0 (Tramer & Boneh 2021) |" in lines[-1]
    assert cli.main(["table", "cifar10/wrn-40-4/*", "--results", str(here)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6
    assert cli.main(["table", "digits", "--results", str(here)]) == 0
    assert capsys.readouterr() == (
        "",
        "dpnb: the table has no row: of digits/* neither the paper has a number nor we a run\n",
    )


@pytest.mark.notebook
def test_a_failing_notebook_is_reported(here):
    """A missing data file fails in the notebook's own words; exit status 1, and the notebook to look at."""
    missing = here / "missing.npz"
    done = shared_runs.python(
        "-m", "dpnb.cli", "run", "digits/wrn-10-1", f"--data-file={missing}", f"--out={here / 'out'}"
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dpnb: ")]
    assert "digits/wrn-10-1 failed: DataError" in line and str(missing) in line
    executed = here / "out" / "unfinished-cifar10_from_scratch.ipynb"
    assert str(executed) in done.stdout and not (here / "out" / "result.json").exists()
    errors = [
        o
        for cell in nbformat.read(executed, 4).cells
        for o in cell.get("outputs", ())
        if o.output_type == "error"
    ]
    assert errors


@pytest.mark.slow
def test_cifar10(tmp_path):
    """On the real images, where the environment says where they are."""
    data_dir = os.environ.get("DPNB_DATA_DIR")
    if not data_dir:
        pytest.skip("set DPNB_DATA_DIR to a TFDS directory with cifar10 to run this")
    sets = [f"--set={pair}" for pair in shared_runs.SMALL]
    done = shared_runs.python(
        "-m", "dpnb.cli", "run", "cifar10/wrn-16-4/eps8", "--preset=smoke", *sets, f"--data-dir={data_dir}",
        f"--out={tmp_path}", "--data-note=a test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "result.json").read_text())
    assert (r["data"]["name"], r["data"]["training_examples"]) == ("cifar10", 50_000)
    assert r["evaluated_on"] == "10000 test images" and "a test" in r["data"]["note"]


def test_the_cache_is_listed_and_cleared(capsys, here, disk_cache):
    cache.put(
        "images", {"n": 1}, "cifar10, decoded, of somewhere", None, {"pixels": np.zeros(2**20, np.uint8)}
    )
    cache.put("accounting", {"n": 2}, "sigma of 150 steps", 0.5)
    assert cli.main(["cache"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["accounting", "images"]  # the last used first
    assert lines[1].split()[1:4] == ["1.0", "MiB", "made"] and lines[1].endswith(
        "cifar10, decoded, of somewhere"
    )
    assert total == f"1.0 MiB of 1.0 GiB in {disk_cache}"
    assert "invalid choice: 'weights'" in refusal(capsys, "cache", "--clear", "weights")
    assert cli.main(["cache", "--clear", "images"]) == 0
    assert "1.0 MiB removed" in capsys.readouterr().out
    assert [entry.kind for entry in cache.entries()] == ["accounting"]
    assert cli.main(["cache", "--clear"]) == 0
    assert not cache.entries()


def test_verification_does_not_use_the_cache(capsys, here, disk_cache, monkeypatch):
    seen = []

    def places(directory):
        cache.put("accounting", {}, "a lie", 1.0)
        seen.append(cache.get("accounting", {}))
        raise ValueError("seen enough")

    monkeypatch.setattr(verification, "places", places)
    cache.put("accounting", {}, "a lie", 1.0)
    assert cli.main(["verify", "somewhere"]) == 2
    assert seen == [None] and cache.get("accounting", {})


@pytest.mark.parametrize("stopped, failures, planned, status", [
    (["", ""], {}, 2, 0),
    (["", "stopped in time after 1 of 3 updates; it goes on from there"], {}, 2, 3),
    ([""], {}, 2, 3),  # the deadline came before the second
    ([""], {"second": "why"}, 2, 1),
    (["", "the next step would exceed PrivacyBudget(epsilon=1.0): the run ends here"], {}, 2, 0),  # no command goes on
])  # fmt: skip
def test_status_3_means_that_the_same_command_goes_on(stopped, failures, planned, status):
    made = sweep.Sweep([{"stopped": text} for text in stopped], failures)
    assert cli.sweep_status(made, planned) == status


@pytest.mark.parametrize("minutes, stopped, matching, left", [
    (None, "stopped in time after 1 of 40 updates", (), 0),
    (5.0, "stopped in time after 1 of 40 updates", ("eps3",), 3),
    (5.0, "the budget is spent", ("eps3", "eps8"), 1),
    (5.0, "the budget is spent", ("eps3", "eps8", "not-private"), 0),
])  # fmt: skip
def test_a_study_that_ends_in_time_says_so(minutes, stopped, matching, left, monkeypatch, capsys, tmp_path):
    """Status 3 while a later sitting has something to do. Records are matched by what they ran, whatever its name."""
    eps1 = {"experiment": "digits/demo/eps1", "preset": "smoke", "seed": 0, "stopped": stopped}
    made = [eps1, {**eps1, "experiment": "another name", "stopped": ""}]
    monkeypatch.setattr(results, "load", lambda root: made)
    monkeypatch.setattr(results, "matching_records", lambda e, made: made[1:] * e.name.endswith(matching))
    options = types.SimpleNamespace(preset="smoke", seeds=None, set=[], minutes=minutes)
    assert cli.study_status("digits/demo/*", tmp_path, options) == 3 * bool(left)
    assert (f"{left} of 4 runs are left" in capsys.readouterr().out) == bool(left)


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_are_refused_before_anything_starts(minutes, capsys):
    assert cli.main(["run", "digits/wrn-10-1", f"--minutes={minutes}"]) == 2
    assert "minutes must be a positive number" in capsys.readouterr().err
