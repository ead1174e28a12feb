"""What people write and what broken disks leave: answered by a sentence of ours, never by an inner library's error.

Hypothesis makes the inputs; it is derandomised, so that every run tests the same ones.
"""

import contextlib
import dataclasses
import functools
import json
import math
import warnings

import numpy as np
import pytest
import shared_runs
from broken import broken, deterministic, other_values
from hypothesis import given
from hypothesis import strategies as st

from dpnb import cli, data, experiments, privacy, results
from dpnb.data import DataError
from dpnb.experiments import Experiment
from dpnb.results import consistency, verification

FIELDS = [f.name for f in dataclasses.fields(Experiment)]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5),
    st.sampled_from([10**400, -(10**400), 2**31, 2**63, 2**64, 5e-324, 1e308, "1e3", "None", "nan", "", "x" * 300]),
    st.sampled_from([np.float32(0.1), np.int8(-3), np.float16(np.inf), np.bool_(True), np.zeros(2), np.datetime64(0, "s")]),
    st.complex_numbers(), st.fractions(), st.decimals(), st.dates(),
)  # fmt: skip
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)


@deterministic(max_examples=600)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_experiments(changes):
    """Refused with a sentence that names a field, or accepted and then of the right types and one fingerprint."""
    try:
        made = experiments.get("digits/wrn-10-1").replace(**changes)
    except ValueError as error:
        assert any(name in str(error) for name in [*changes, "fixed features"]), error
        assert len(str(error)) < 1000
        return
    for f in dataclasses.fields(made):
        value = getattr(made, f.name)
        assert value is None or type(value) in (bool, int, float, str)
        assert not (isinstance(value, float) and math.isnan(value))
    assert Experiment(**json.loads(json.dumps(vars(made)))).fingerprint() == made.fingerprint()


@deterministic(max_examples=250)
@given(
    st.sampled_from(FIELDS),
    st.one_of(
        st.text(max_size=30),
        VALUES.map(repr),
        st.sampled_from(["[" * 500, "(" * 90 + ")" * 90, "9" * 6000, "1or", "\0", "-" * 3000 + "1"]),
    ),
)
def test_set(name, text):
    """`--set NAME=TEXT`."""
    try:
        experiments.get("digits/wrn-10-1", **cli.changes([f"{name}={text}"]))
    except ValueError as error:
        assert name in str(error) or "fixed features" in str(error)


@deterministic(max_examples=100)
@given(st.text(max_size=40))
def test_set_of_anything(pair):
    try:
        cli.changes([pair])
    except ValueError as error:
        assert "--set" in str(error) or "no hyper-parameter" in str(error)


RECORD = min((shared_runs.ROOT / "results" / "cifar10").rglob("result.json"), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def folder():
    return shared_runs.temporary("broken")


@deterministic(max_examples=120)
@given(
    broken(RECORD.read_bytes())
    | other_values(json.loads(RECORD.read_text())).map(lambda r: json.dumps(r).encode())
)
def test_records(folder, content):
    """Of a broken record: it is read, listed, tabled and matched, or left out with a warning."""
    (folder / "result.json").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", results.LeftOut)
        records = results.load(folder)
        name = json.loads(RECORD.read_text())["experiment"]
        e = experiments.get(name, json.loads(RECORD.read_text())["preset"])
        results.status(e, records)
        results.table(name, records)
        results.summary([e], records)
    for record in records:
        consistency.consistency(record, folder)


@deterministic(max_examples=100)
@given(
    broken(RECORD.read_bytes())
    | other_values(json.loads(RECORD.read_text())).map(lambda r: json.dumps(r).encode())
)
def test_verify(folder, content):
    """The data are not there, so that only the record is looked at."""
    (folder / "result.json").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: (_ for _ in ()).throw(DataError("not here")))
        try:
            verification.verify(folder)
        except ValueError as error:
            assert "must be a record" in str(error)


@functools.cache
def ledger() -> bytes:
    path = shared_runs.temporary("ledger") / "ledger.jsonl"
    with privacy.Ledger(path, privacy.PrivacyBudget(8.0, 1e-5), "rdp", settings="x") as made:
        for step in range(3):
            made.charge(step, privacy.Mechanism(2.0, 0.1), f"{step:064x}")
    return path.read_bytes()


@deterministic(max_examples=100)
@given(st.data())
def test_ledgers(folder, drawn):
    path = folder / "ledger.jsonl"
    path.write_bytes(drawn.draw(broken(ledger())))
    try:
        privacy.Ledger.open(path, read_only=True)
    except privacy.LedgerError as error:
        assert str(path) in str(error)


@functools.cache
def arrays() -> bytes:
    path = shared_runs.temporary("arrays") / "bands.npz"
    data.save(shared_runs.bands(), path)
    return path.read_bytes()


@deterministic(max_examples=100)
@given(st.data())
def test_array_files(folder, drawn):
    path = folder / "bands.npz"
    path.write_bytes(drawn.draw(broken(arrays())))
    with contextlib.suppress(DataError):
        data.load("bands", file=path)
