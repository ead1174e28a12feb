"""A folder that cannot be written, a full disk, odd names: one sentence, and nothing paid for is lost."""

import contextlib
import errno
import os
import pathlib
import sys

import nbformat
import numpy as np
import pytest
import shared_runs
import tiny

from dpnb import cli, data, files, folders, results, sweep, training
from dpnb.training import session, update

pytestmark = pytest.mark.usefixtures("checked_once")
CHANGES = dict(dataset="bands", steps=2, expected_batch_size=24, delta=1e-3, physical_batch_size=8, augmult=0,
               accountant="rdp", eval_every=0)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(update, "make_model", shared_runs.linear)
    monkeypatch.setattr(session, "make_model", shared_runs.linear)


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def disk_full(owner, name, after):
    """The disk is full from the call number `after` on."""
    true, calls = getattr(owner, name), 0

    def sometimes(*arguments, **more):
        nonlocal calls
        calls += 1
        return full() if calls > after else true(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, sometimes)
        yield


def weights(run) -> np.ndarray:
    return np.asarray(run.ema_params["layer"]["kernel"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def train(directory):
    e = tiny.experiment(augmult=0, eval_every=2)
    return training.train(e, tiny.data(), directory, model=tiny.Linear(), checkpoint_every=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "after"), [("ledger", 0), ("ledger", 3), ("sync", 2), ("checkpoint", 2)])
def test_a_run_on_a_full_disk_loses_nothing(tmp_path, whole, where, after):
    """Once there is room again it goes on, ends at the same bits, and pays for no update twice."""
    owner, name = {
        "ledger": (os, "write"), "sync": (os, "fsync"),
        "checkpoint": (training.checkpoints.Checkpoints, "save"),
    }[where]  # fmt: skip
    with disk_full(owner, name, after), pytest.raises(OSError, match="No space left"):
        train(tmp_path)
    again = train(tmp_path)
    assert again.steps == whole.steps and again.events == whole.events
    np.testing.assert_array_equal(weights(again), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])  # of weights, record and statement
def test_a_record_that_does_not_fit_is_written_later(tmp_path, small, after):
    """The run is finished and its checkpoint kept: the next sweep trains nothing, and writes the record."""
    todo = sweep.plan("cifar10/lr-clip/lr1-c1", "smoke", **CHANGES)
    said = []
    with disk_full(results.store, "write_atomic", after):
        made = sweep.run(todo, shared_runs.bands(), tmp_path, said.append)
    assert list(made.failures.values()) == ["OSError: [Errno 28] No space left on device"]
    ledger = next(tmp_path.rglob("ledger.jsonl")).read_bytes()
    (record,) = sweep.run(todo, shared_runs.bands(), tmp_path, said.append).records
    assert record["privacy"]["steps"] == 2 and next(tmp_path.rglob("ledger.jsonl")).read_bytes() == ledger


def test_a_sweep_goes_on_when_not_even_the_failure_can_be_written(tmp_path, small, monkeypatch):
    monkeypatch.setattr(training, "train", full)
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    said = []
    made = sweep.run(
        sweep.plan("cifar10/lr-clip/lr1-*", "smoke", **CHANGES), shared_runs.bands(), tmp_path, said.append
    )
    assert len(made.failures) == 3 and said[-1].startswith("failed: cifar10/lr-clip/lr1-c10, seed 0: OSError")


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import shared_runs, tiny
from dpnb import data, results, sweep, training
from dpnb.training import session, update
update.make_model = session.make_model = shared_runs.linear
todo = sweep.plan("cifar10/lr-clip/lr1-c1", "smoke", **{changes!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, resource.RLIM_INFINITY))
made = sweep.run(todo, shared_runs.bands(), {root!r})
print(len(made.records), *made.failures.values(), sep=chr(10))
"""


@pytest.mark.slow
def test_a_true_limit_of_the_system(tmp_path):
    """No file may grow beyond 300 bytes (EFBIG), then beyond a gigabyte: the same run goes on, and is finished."""
    if sys.platform == "win32":
        pytest.skip("limits are those of Unix")

    def run(most):
        text = LIMITED.format(
            tests=str(shared_runs.ROOT / "tests"), changes=CHANGES, bytes=most, root=str(tmp_path / "out")
        )
        done = shared_runs.python("-c", text)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    assert any("the line was written in part" in line for line in run(300))
    assert not list(tmp_path.rglob("result.json"))
    assert run(2**30)[-1] == "1" and len(list(tmp_path.rglob("result.json"))) == 1


def test_a_table_that_does_not_fit_leaves_the_document_alone(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table digits/* -->\n<!-- end -->\n")
    before = page.read_text()
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["table", "digits/*", "--results", str(tmp_path), "--write", str(page)]) == 2
    assert "No space left" in capsys.readouterr().err and page.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]


# Names.


def test_a_long_name_of_a_run_is_shortened_to_one_of_its_own(tmp_path):
    base = sweep.plan("cifar10/finetune/all/eps1", "teach")[0]
    long = [base.replace(pretrained="weights/" + "x" * 300 + end) for end in ("a", "b")]
    long.append(base.replace(pretrained="ä" * 200))
    places = [sweep.directory(tmp_path, e) for e in long]
    assert len({*places}) == 3
    for place in places:
        place.mkdir(parents=True)  # the file system takes it
        assert place.name.startswith("teach-seed0-pretrained=") and len(os.fsencode(place.name)) <= 143
        files.write_atomic(place / ("y" * 250), "a long name, with a partial file beside it")
    short = base.replace(learning_rate=0.25)
    assert sweep.directory("x", short).name == "teach-seed0-learning_rate=0.25"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", pathlib.Path("/proc/none"), pathlib.Path("/dev/null/x")):
        with pytest.raises(
            OSError, match=f"^{place} must be a folder that can be written .*; choose another$"
        ):
            files.writable_folder(place)
    with pytest.raises(ValueError, match="at most 255 bytes, got 256"):
        files.writable_folder(tmp_path / ("x" * 256) / "y")
    assert files.writable_folder(tmp_path / "a" / ("x" * 255)).is_dir()
    if os.geteuid() == 0:
        pytest.skip("the rest needs permissions, which do not bind root")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        files.writable_folder(tmp_path / "locked")


def test_a_sweep_says_at_once_that_it_cannot_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data were loaded"))
    (tmp_path / "file").write_text("")
    arguments = ["run", "cifar10/lr-clip/*", "--out", str(tmp_path / "file" / "x")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.rstrip() == (
        f"dpnb: {tmp_path / 'file' / 'x'} must be a folder that can be written (Not a directory); choose another"
    )


@pytest.mark.notebook
def test_braces_in_a_folder_are_text(tmp_path, monkeypatch, capsys):
    """Papermill formats the paths that it is given. The home folder cannot be written, too."""
    out, notebooks = tmp_path / "nb{2} {experiment} {", tmp_path / "{0} notebooks"
    record = min((shared_runs.ROOT / "results" / "cifar10").rglob("result.json"))
    parameters = "experiment = preset = seed = changes = data_dir = data_file = data_note = output_dir = None"
    copies = f"import pathlib, shutil; shutil.copy({str(record)!r}, pathlib.Path(output_dir) / 'result.json')"
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(copies),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebooks.mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), notebooks / cli.NOTEBOOK
    )
    monkeypatch.setattr(folders, "NOTEBOOKS", notebooks)
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert cli.main(["run", "digits/wrn-10-1", "--out", str(out)]) == 0, capsys.readouterr().err
    assert f"record: {out / 'result.json'}" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"result.json", cli.NOTEBOOK}
    assert {p.name for p in tmp_path.iterdir()} == {out.name, notebooks.name}
