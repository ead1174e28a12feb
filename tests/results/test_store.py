"""Files that are not records are named, left out, and stop nothing."""

import json
import warnings

import pytest
import shared_runs

from dpnb import cli, experiments, results, sweep
from dpnb.results import verification
from dpnb.results.records import read_record

BROKEN = {
    "empty": b"",
    "foreign": b'{"accuracy": 3}',
    "list": b"[]",
    "null": b"null",
    "number": b"1e999",
    "not text": b"\xff\xfe\x00",
    "zeros": bytes(1000),
    "deep": b"[" * 100_000,
    "long": b"9" * 10_000,
    "without numbers": json.dumps({"accuracy": {}, "finished": "2024", "hyper_parameters": {}}).encode(),
}


def genuine() -> dict:
    return json.loads(min((shared_runs.ROOT / "results" / "cifar10").rglob("result.json")).read_text())


@pytest.fixture
def root(tmp_path):
    """A genuine record between broken ones."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text(json.dumps(genuine()))
    for name, content in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(content)
    whole = json.dumps(genuine()).encode()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder" / "result.json").mkdir(parents=True)
    return tmp_path


def test_what_is_no_record_is_named_and_left_out(root):
    with pytest.warns(results.LeftOut) as said:
        (found,) = results.load(root)
    assert found == genuine()
    bad = [*BROKEN, "half", "folder"]
    assert len(said) == len(bad)
    for name in bad:
        (line,) = [str(w.message) for w in said if str(root / name / "result.json") in str(w.message)]
        assert "\n" not in line and line.startswith("left out: ")


def test_list_and_table_go_on(root, capsys):
    assert cli.main(["list", "digits/*", "--results", str(root)]) == 0
    out, err = capsys.readouterr()
    assert (
        len(out.splitlines()) == len(experiments.names("digits/*"))
        and len(err.splitlines()) == len(BROKEN) + 2
    )
    assert all(line.startswith("dpnb: left out: ") for line in err.splitlines())
    assert cli.main(["table", genuine()["experiment"], "--results", str(root), "--markdown"]) == 0
    out, err = capsys.readouterr()
    assert f"| {genuine()['experiment']} |" in out and err.count("empty/result.json") == 1


def test_a_sweep_goes_on(root):
    with pytest.warns(results.LeftOut):
        made = sweep.run([], shared_runs.bands(), root, lambda _: None)
    assert made.records == [] and not made.failures


@pytest.mark.parametrize("name", [n for n in BROKEN if n not in ("foreign", "without numbers")])
def test_verify_names_what_is_no_record(tmp_path, capsys, name):
    (tmp_path / "result.json").write_bytes(BROKEN[name])
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert f"dpnb: {tmp_path / 'result.json'} must be a record" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["foreign", "without numbers"])
def test_verify_fails_a_record_that_says_too_little(tmp_path, name):
    (tmp_path / "result.json").write_bytes(BROKEN[name])
    report = verification.verify(tmp_path)
    assert not report.ok and "a record must have what" in report.lines[0]


def test_all_records_of_the_checkout_are_read():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(results.load(shared_runs.ROOT / "results")) > 100


def test_each_missing_item_is_named(tmp_path):
    for key in ("experiment", "finished", "hyper_parameters", "stopped", "ledger", "devices"):
        (tmp_path / "result.json").write_text(json.dumps({k: v for k, v in genuine().items() if k != key}))
        with pytest.raises(ValueError, match=f"{key} is missing"):
            read_record(tmp_path / "result.json")
    (tmp_path / "result.json").write_text(json.dumps({**genuine(), "accuracy": {"raw": "1", "ema": 2}}))
    with pytest.raises(ValueError, match="raw is str"):
        read_record(tmp_path / "result.json")
