"""The ledger: nothing released is ever missing from it, and nothing makes it overspend.

The histories of crashes are random with fixed seeds, so every test is deterministic.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from dpnb import privacy
from dpnb.privacy import (
    BudgetExceeded,
    Ledger,
    LedgerError,
    LedgerLocked,
    Mechanism,
    MissingAccountant,
    PrivacyBudget,
    SharedNoise,
    epsilon,
    events_from_json,
)
from dpnb.privacy import ledger as module
from dpnb.training.replay import stream_name

DELTA = 1e-5
M = Mechanism(10.0, 0.1)
OTHER = Mechanism(5.0, 0.1)
BUDGET = PrivacyBudget(0.25, DELTA)  # some dozens of steps of M
FREE = PrivacyBudget(math.inf, DELTA)


@pytest.fixture(scope="session")
def allowed():
    """Steps of M that fit BUDGET, under either accountant."""
    return {kind: privacy.affordable_steps(BUDGET, M, kind) for kind in privacy.ACCOUNTANTS}


@pytest.fixture
def remembered(monkeypatch):
    """The accountant's own numbers, each computed once in the test session."""
    real = privacy.affordable_steps

    def look_up(budget, mechanism, accountant="pld", spent=None):
        key = budget, mechanism, accountant, tuple((spent or {}).items())
        if key not in _MEMORY:
            _MEMORY[key] = real(budget, mechanism, accountant, spent)
        return _MEMORY[key]

    monkeypatch.setattr(module, "affordable_steps", look_up)


_MEMORY = {}


@pytest.fixture
def no_accountant(monkeypatch):
    """A machine without dp-accounting."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)


class Killed(BaseException):
    """The process dies here."""


@contextlib.contextmanager
def dying_while_writing(at_byte):
    """The next line reaches the disk up to `at_byte`, and then the process dies."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        real = os.write

        def torn(file, data):
            real(file, data[:at_byte])
            raise Killed

        patch.setattr(os, "write", torn)
        yield


def charge(ledger, steps, mechanism=M, released="run"):
    return [ledger.charge(step, mechanism, released) for step in steps]


class TestBudget:
    @pytest.mark.parametrize("accountant", privacy.ACCOUNTANTS)
    def test_exactly_what_fits(self, tmp_path, accountant, allowed):
        n, path = allowed[accountant], tmp_path / "ledger.jsonl"
        assert 5 < n < 200
        with Ledger(path, BUDGET, accountant) as ledger:
            assert ledger.remaining(M) == n and ledger.spent == 0.0
            assert all(charge(ledger, range(n)))
            assert ledger.remaining(M) == 0
            before = path.read_bytes()
            with pytest.raises(BudgetExceeded, match=f"{n} steps are spent"):
                ledger.charge(n, M, "run")
            assert path.read_bytes() == before and ledger.steps == n
            assert ledger.spent == epsilon(M, n, DELTA, accountant) <= BUDGET.epsilon
            assert epsilon(M, n + 1, DELTA, accountant) > BUDGET.epsilon

    def test_a_budget_read_off_the_run_allows_the_run(self):
        budget = PrivacyBudget(epsilon(M, 12, DELTA), DELTA)
        ledger = Ledger(None, budget)
        charge(ledger, range(12))
        with pytest.raises(BudgetExceeded):
            ledger.charge(12, M, "run")

    def test_mixed_mechanisms_share_it(self):
        ledger, taken = Ledger(None, BUDGET, "rdp"), 0
        with pytest.raises(BudgetExceeded):
            for taken in range(500):
                ledger.charge(taken, [M, OTHER][taken // 4 % 2], "run")
        assert ledger.steps == taken and len(ledger.events()) > 1
        assert ledger.spent <= BUDGET.epsilon
        last = [M, OTHER][taken // 4 % 2]
        counts = privacy.counts_from_json([*ledger.events(), {**vars(last), "steps": 1}])
        assert epsilon(privacy.compose(counts), 1, DELTA, "rdp") > BUDGET.epsilon

    def test_infinite_budget_never_refuses(self, no_accountant):
        ledger = Ledger(None, FREE)
        charge(ledger, range(50), Mechanism(0.0, 0.1))
        charge(ledger, range(50, 60), Mechanism(0.1, 1.0))
        assert ledger.steps == 60

    def test_no_noise_is_refused(self):
        with pytest.raises(BudgetExceeded):
            Ledger(None, BUDGET).charge(0, Mechanism(0.0, 0.1), "run")

    def test_the_accountant_runs_once_for_a_mechanism(self, monkeypatch):
        calls = []
        monkeypatch.setattr(module, "affordable_steps", lambda *a: calls.append(a) or 1000)
        charge(Ledger(None, BUDGET), range(300))
        assert len(calls) == 1

    def test_bad_calls(self):
        ledger = Ledger(None, FREE)
        with pytest.raises(ValueError, match="step must be >= 0"):
            ledger.charge(-1, M, "run")
        for mechanism, released in [("x", "run"), (M, ""), (M, None), (M, b"run")]:
            with pytest.raises(TypeError, match="hash that is a string"):
                ledger.charge(0, mechanism, released)
        with pytest.raises(TypeError):
            ledger.charge(0.5, M, "run")
        with pytest.raises(ValueError, match="accountant must be"):
            Ledger(None, FREE, "gdp")


class TestReplay:
    def test_the_same_step_is_free_and_not_written(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            assert charge(ledger, [0, 1, 2]) == [True] * 3
            before = path.read_bytes()
            assert charge(ledger, [2, 0, 1, np.int64(1)]) == [False] * 4
        with Ledger(path, FREE) as ledger:
            assert charge(ledger, [0, 1, 2]) == [False] * 3
            assert path.read_bytes() == before and ledger.steps == 3

    def test_replaying_is_free_even_when_nothing_is_left(self, allowed):
        ledger = Ledger(None, BUDGET)
        charge(ledger, range(allowed["pld"]))
        assert not any(charge(ledger, range(allowed["pld"])))

    def test_another_value_is_charged_in_full(self):
        ledger = Ledger(None, FREE)
        assert charge(ledger, [0, 1]) + charge(ledger, [0, 1], released="edited") == [True] * 4
        assert ledger.steps == 4 and ledger.events() == [{**vars(M), "steps": 4}]

    @pytest.mark.parametrize("change", [(9.0, 0.1), (10.0, 0.2), (10.0, 0.1, "shuffle")])
    def test_another_mechanism_is_charged_though_the_hash_is_the_same(self, change):
        ledger = Ledger(None, FREE)
        assert ledger.charge(0, M, "run") and ledger.charge(0, Mechanism(*change), "run")
        assert ledger.steps == 2 and len(ledger.events()) == 2

    def test_one_noise_has_one_value(self, tmp_path):
        """The same again is free; another value of the same stream is refused, and may come from another one."""
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            assert ledger.charge(3, M, "value", "stream") and not ledger.charge(3, M, "value", "stream")
            before = path.read_bytes()
            for _ in range(2):
                with pytest.raises(SharedNoise, match="throw the new value away"):
                    ledger.charge(3, M, "other", "stream")
            assert path.read_bytes() == before and ledger.steps == 1
        with Ledger(path, FREE) as ledger:
            with pytest.raises(SharedNoise):
                ledger.charge(3, M, "other", "stream")
            assert ledger.charge(4, M, "other", "stream") and ledger.charge(3, M, "other", "another stream")
            assert not ledger.charge(3, M, "value", "a third") and ledger.steps == 3

    def test_what_may_be_a_repetition_is_known(self, allowed):
        ledger = Ledger(None, BUDGET)
        charge(ledger, range(allowed["pld"]))
        assert ledger.may_repeat(0) and not ledger.may_repeat(allowed["pld"])
        with pytest.raises(BudgetExceeded):
            ledger.check_affordable(0, M)

    def test_events(self):
        ledger = Ledger(None, FREE)
        for mechanism, steps in [(M, range(3)), (OTHER, range(3, 5)), (M, range(5, 6))]:
            charge(ledger, steps, mechanism)
        events = json.loads(json.dumps(ledger.events()))
        assert [(e["noise_multiplier"], e["steps"]) for e in events] == [(10.0, 3), (5.0, 2), (10.0, 1)]
        for kind in privacy.ACCOUNTANTS:
            assert epsilon(events_from_json(events), 1, DELTA, kind) == ledger.epsilon(kind)
        assert ledger.to_event() == events_from_json(events)
        assert ledger.is_exactly_accounted
        ledger.charge(9, Mechanism(10.0, 0.1, "shuffle"), "run")
        assert not ledger.is_exactly_accounted


class TestFile:
    def test_line_by_line(self, tmp_path):
        with Ledger(
            tmp_path / "new" / "ledger.jsonl", BUDGET, allowed_steps={M: 3}, settings="mine"
        ) as ledger:
            ledger.charge(7, M, "abc")
        with Ledger(tmp_path / "new" / "ledger.jsonl", BUDGET, settings="others") as ledger:
            assert ledger.settings == "mine"
        fields = {"noise_multiplier": 10.0, "sampling_probability": 0.1, "sampler": "poisson"}
        lines = [json.loads(line) for line in (tmp_path / "new" / "ledger.jsonl").read_text().splitlines()]
        assert lines == [
            {
                "ledger": 2,
                "epsilon": "0.25",
                "delta": 1e-5,
                "accountant": "pld",
                "settings": "mine",
                "chain": lines[0]["chain"],
            },
            {"allowed_steps": 3, **fields, "chain": lines[1]["chain"]},
            {"step": 7, "released": "abc", "stream": "", **fields, "chain": lines[2]["chain"]},
        ]
        said = [
            json.dumps(
                [lines[1]["chain"], {"step": 7, "released": "abc", "stream": "", **fields}], sort_keys=True
            )
        ]
        assert lines[2]["chain"] == hashlib.sha256(said[0].encode()).hexdigest()[:32]

    def test_nothing_is_written_before_the_first_charge(self, tmp_path):
        """An opening that charges nothing binds nobody: another budget is another run's."""
        path = tmp_path / "ledger.jsonl"
        Ledger(path, BUDGET, allowed_steps={M: 3}).close()
        with pytest.raises(BudgetExceeded), Ledger(path, BUDGET) as ledger:
            ledger.charge(0, Mechanism(0.0, 0.1), "run")
        assert not path.exists()
        with Ledger(path, FREE, "rdp") as ledger:
            ledger.charge(0, M, "run")
        assert Ledger.open(path, read_only=True).accountant == "rdp"

    @pytest.mark.parametrize("forge", ["change", "remove", "swap", "repeat"])
    def test_an_edited_line_is_noticed(self, tmp_path, forge):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            charge(ledger, range(5))
        lines = path.read_text().splitlines()
        lines[2:4] = {
            "change": [lines[2].replace("10.0", "11.0"), lines[3]], "remove": [lines[3]],
            "swap": lines[3:1:-1], "repeat": [lines[2], lines[2], lines[3]],
        }[forge]  # fmt: skip
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(LedgerError, match="damaged or edited"):
            Ledger(path, FREE)

    @pytest.mark.parametrize("how", ["replaced", "deleted", "written to", "cut"])
    def test_a_file_that_somebody_else_touches_ends_the_run(self, tmp_path, how):
        """A copy put in its place admits no second writer, and the first one charges nothing to nowhere."""
        path = tmp_path / "ledger.jsonl"
        first = Ledger(path, FREE)
        charge(first, range(3))
        if how == "replaced":
            (tmp_path / "copy").write_bytes(path.read_bytes())
            os.replace(tmp_path / "copy", path)
        elif how == "deleted":
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - 40) if how == "cut" else file.seek(0, 2) and file.write(
                    b"\n"
                )
        with pytest.raises(LedgerLocked):
            Ledger(path, FREE)
        with pytest.raises(LedgerError, match="must not be changed from outside"):
            first.charge(3, M, "run")
        with pytest.raises(LedgerError, match="writing to it failed"):
            first.charge(3, M, "run")

    def test_a_line_of_brackets_is_damage(self, tmp_path):
        (tmp_path / "l").write_text("[" * 100_000 + "\n")
        with pytest.raises(LedgerError, match="line 1 must be"):
            Ledger.open(tmp_path / "l")

    def test_on_disk_before_charge_returns(self, tmp_path, monkeypatch):
        """Another process sees the line at once, and fsync came after the write."""
        order, path = [], tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            write, fsync = os.write, os.fsync
            monkeypatch.setattr(os, "write", lambda *a: order.append("write") or write(*a))
            monkeypatch.setattr(os, "fsync", lambda *a: order.append("fsync") or fsync(*a))
            ledger.charge(0, M, "run")
            assert order == ["fsync", "write", "fsync"]  # its name in the directory first
            assert Ledger.open(path, read_only=True).steps == 1

    def test_open_finds_the_budget_and_the_steps(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        for budget, kind in [(BUDGET, "rdp"), (FREE, "pld")]:
            with Ledger(path, budget, kind) as ledger:
                charge(ledger, range(3))
                ledger.charge(3, OTHER, "run")
            with Ledger.open(path) as again:
                assert (again.budget, again.accountant) == (budget, kind)
                assert again.events() == ledger.events() and again.steps == 4
                assert again.charge(4, M, "run") and not again.charge(3, OTHER, "run")
            path.unlink()

    def test_read_only(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as writer:
            charge(writer, range(3))
            reader = Ledger.open(path, read_only=True)
            assert reader.steps == 3
            with pytest.raises(LedgerError, match="read only"):
                reader.charge(3, M, "run")
            path.write_bytes(
                path.read_bytes() + b'{"step": 3, "fing'
            )  # the writer is in the middle of a line
            assert Ledger.open(path, read_only=True).steps == 3
            assert path.read_bytes().endswith(b"fing")

    def test_nothing_to_open(self, tmp_path):
        with pytest.raises(LedgerError, match="no such file"):
            Ledger.open(tmp_path / "ledger.jsonl")
        assert not (tmp_path / "ledger.jsonl").exists()
        (tmp_path / "ledger.jsonl").write_text("")
        with pytest.raises(LedgerError, match="got nothing"):
            Ledger.open(tmp_path / "ledger.jsonl")

    def test_closed(self, tmp_path):
        with Ledger(tmp_path / "ledger.jsonl", FREE) as ledger:
            ledger.charge(0, M, "run")
        with pytest.raises(LedgerError, match="is closed"):
            ledger.charge(1, M, "run")
        assert ledger.steps == 1  # still to be read

    @pytest.mark.parametrize("line", [0, 1, 2, 3])
    @pytest.mark.parametrize("damage", [b"garbage", b"[1]", b"", b"\0\0\0", b'{"step": 1}', b'{"ledger": 9}'])
    def test_a_damaged_line_is_an_error_not_a_guess(self, tmp_path, line, damage):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            charge(ledger, range(3))
        lines = path.read_bytes().splitlines()
        lines[line] = damage
        path.write_bytes(b"\n".join(lines) + b"\n")
        before = path.read_bytes()
        with pytest.raises(LedgerError, match=f"line {line + 1} must be"):
            Ledger(path, FREE)
        assert path.read_bytes() == before

    def test_a_field_too_many_is_damage(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            charge(ledger, range(1))
        line = json.loads(path.read_text().splitlines()[1]) | {"free": True}
        chain = json.loads(path.read_text().splitlines()[0])["chain"]
        line["chain"] = module._chained(chain, {k: v for k, v in line.items() if k != "chain"})
        path.write_text(path.read_text().splitlines()[0] + "\n" + json.dumps(line) + "\n")
        with pytest.raises(LedgerError, match="line 2"):
            Ledger(path, FREE)

    def test_another_version(self, tmp_path):
        for version, said in [(1, "does not say what each step released"), (3, "update dpnb")]:
            header = {"ledger": version, "epsilon": "1.0", "delta": 1e-5, "accountant": "pld"}  # of old
            (tmp_path / "l").write_text(json.dumps(header) + "\n")
            with pytest.raises(LedgerError, match=said):
                Ledger.open(tmp_path / "l")


class TestCrash:
    def test_torn_at_every_byte(self, tmp_path):
        """The journal of a run that was killed within a write ends as that of one that was not."""
        whole = tmp_path / "whole.jsonl"
        with Ledger(whole, FREE) as ledger:
            charge(ledger, range(3))
            start = whole.stat().st_size
            charge(ledger, [3, 4])
        line = len(whole.read_bytes().splitlines()[-2]) + 1
        for at in range(line + 1):
            path = tmp_path / "torn.jsonl"
            path.write_bytes(whole.read_bytes()[:start])
            ledger = Ledger(path, FREE)
            with dying_while_writing(at):
                ledger.charge(3, M, "run")
            assert path.stat().st_size == start + at
            with Ledger(path, FREE) as again:
                assert again.charge(3, M, "run") == (at < line - 1)  # all but the newline: kept, so a replay
                again.charge(4, M, "run")
                assert again.steps == 5
            assert path.read_bytes() == whole.read_bytes()

    def test_torn_while_being_created(self, tmp_path):
        path, whole = tmp_path / "torn.jsonl", tmp_path / "whole.jsonl"
        with Ledger(whole, FREE) as ledger:
            ledger.charge(0, M, "run")
        for at in range(whole.stat().st_size + 1):
            with dying_while_writing(at):
                Ledger(path, FREE).charge(0, M, "run")
            with Ledger(path, FREE) as again:
                again.charge(0, M, "run")
                assert again.steps == 1
            assert path.read_bytes() == whole.read_bytes()
            path.unlink()

    def test_a_newline_stripped_by_an_editor_loses_no_step(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            charge(ledger, range(3))
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
        assert Ledger.open(path, read_only=True).steps == 3
        with Ledger(path, FREE) as ledger:
            assert ledger.steps == 3
            charge(ledger, [3])
        assert Ledger.open(path, read_only=True).steps == 4

    @pytest.mark.parametrize("error", [OSError(28, "disk full"), KeyboardInterrupt()])
    def test_a_failed_write_closes_the_ledger(self, tmp_path, monkeypatch, error):
        path = tmp_path / "ledger.jsonl"
        ledger = Ledger(path, FREE)
        charge(ledger, range(2))

        def fail(file):
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(os, "fsync", fail)
            ledger.charge(2, M, "run")
        with pytest.raises(LedgerError, match="writing to it failed; open it anew"):
            ledger.charge(2, M, "run")
        with Ledger(path, FREE) as again:  # the lock is free, the line is there: counted, and its replay free
            assert charge(again, range(4)) == [False, False, False, True]
            assert again.steps == 4

    def test_a_short_write_is_an_error(self, tmp_path, monkeypatch):
        ledger, write = Ledger(tmp_path / "ledger.jsonl", FREE), os.write
        with monkeypatch.context() as patch, pytest.raises(OSError, match="in part"):
            patch.setattr(os, "write", lambda file, data: write(file, data[:-3]))
            ledger.charge(0, M, "run")
        with Ledger(tmp_path / "ledger.jsonl", FREE) as again:
            assert again.steps == 0 and again.charge(0, M, "run")

    def test_killed_for_real(self, tmp_path):
        """SIGKILL: whatever was released is in the journal, at most one step more, and no lock stays."""
        path = tmp_path / "ledger.jsonl"
        code = f"""
import itertools
from dpnb.privacy.ledger import Ledger
from dpnb.privacy import Mechanism, PrivacyBudget
ledger = Ledger({str(path)!r}, PrivacyBudget(float("inf"), 1e-5))
for step in itertools.count():
    ledger.charge(step, Mechanism(10.0, 0.1), "run")
    print(step, flush=True)
"""
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            released = [int(process.stdout.readline()) for _ in range(25)]
            with pytest.raises(LedgerLocked):  # while it lives
                Ledger(path, FREE)
            process.send_signal(signal.SIGKILL)
            released += [int(line) for line in process.stdout.read().split()]
        with Ledger(path, FREE) as ledger:
            assert len(released) <= ledger.steps <= len(released) + 1
            assert not any(charge(ledger, released))


class TestLock:
    def test_one_writer(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        first = Ledger(path, FREE)
        first.charge(0, M, "run")
        for attempt in (lambda: Ledger(path, FREE), lambda: Ledger.open(path)):
            with pytest.raises(LedgerLocked, match="one writer.*restart the kernel"):
                attempt()
        assert first.charge(1, M, "run")  # the failed attempts took nothing away
        first.close()
        with Ledger(path, FREE) as second:
            assert second.steps == 2

    def test_a_forgotten_ledger_frees_its_lock(self, tmp_path):
        Ledger(tmp_path / "ledger.jsonl", FREE).charge(0, M, "run")
        Ledger(tmp_path / "ledger.jsonl", FREE).close()

    def test_a_refused_opening_frees_its_lock(self, tmp_path):
        with Ledger(tmp_path / "ledger.jsonl", FREE) as ledger:
            ledger.charge(0, M, "run")
        with pytest.raises(LedgerError) as kept_alive:
            Ledger(tmp_path / "ledger.jsonl", BUDGET)
        Ledger(tmp_path / "ledger.jsonl", FREE).close()
        assert "cannot be changed" in str(kept_alive.value)

    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch):
        def unsupported(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(module.fcntl, "flock", unsupported)
        with pytest.warns(UserWarning, match="cannot be locked"):
            Ledger(tmp_path / "ledger.jsonl", FREE).close()


class TestWithoutDpAccounting:
    def test_a_precomputed_number_of_steps(self, tmp_path, allowed, no_accountant):
        n = allowed["pld"]
        with Ledger(tmp_path / "ledger.jsonl", BUDGET, allowed_steps={M: n}) as ledger:
            charge(ledger, range(n))
            with pytest.raises(BudgetExceeded):
                ledger.charge(n, M, "run")
            assert ledger.events() == [{**vars(M), "steps": n}]
            with pytest.raises(MissingAccountant):
                _ = ledger.spent

    def test_it_is_remembered(self, tmp_path, no_accountant):
        with Ledger(tmp_path / "ledger.jsonl", BUDGET, allowed_steps={M: 5}) as ledger:
            charge(ledger, range(3))
        with Ledger(tmp_path / "ledger.jsonl", BUDGET) as ledger:
            assert ledger.remaining(M) == 2

    def test_nothing_precomputed(self, no_accountant):
        with pytest.raises(MissingAccountant, match="allowed_steps"):
            Ledger(None, BUDGET).charge(0, M, "run")

    def test_it_holds_for_one_mechanism_alone(self, no_accountant):
        ledger = Ledger(None, BUDGET, allowed_steps={M: 5, OTHER: 2})
        ledger.charge(0, M, "run")
        with pytest.raises(MissingAccountant):  # both numbers together would overspend
            ledger.charge(1, OTHER, "run")
        with pytest.raises(MissingAccountant):
            ledger.charge(1, Mechanism(4.0, 0.1), "run")

    def test_raising_it_at_a_restart(self, tmp_path, no_accountant):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, BUDGET, allowed_steps={M: 5}) as ledger:
            charge(ledger, range(5))
        with pytest.raises(LedgerError, match="cannot raise it to 6"):
            Ledger(path, BUDGET, allowed_steps={M: 6})
        with Ledger(path, BUDGET, allowed_steps={M: 4}) as ledger, pytest.raises(BudgetExceeded):
            ledger.charge(5, M, "run")

    def test_a_wrong_number_is_found_where_it_can_be(self, allowed):
        with pytest.raises(LedgerError, match="allowed_steps must fit"):
            Ledger(None, BUDGET, allowed_steps={M: allowed["pld"] + 1}).charge(0, M, "run")
        Ledger(None, BUDGET, allowed_steps={M: allowed["pld"]}).charge(0, M, "run")
        with pytest.raises(ValueError, match="at least 1"):
            Ledger(None, BUDGET, allowed_steps={M: 0})


class Run:
    """A toy training run that keeps what an adversary sees: every (step, noisy value) ever released.

    A value is determined by the parameters before it, by the noise (of its stream and step), and by `settings`, a pair
    (what is known to matter, what matters and nobody thought of). A checkpoint holds (parameters, stream, settings
    that are known). What it does is what `dpnb.training` and `dpnb.training.replay` do.
    """

    def __init__(self, path):
        self.path, self.noise = path, {}
        self.released, self.checkpoints = set(), {0: ("initial", "", "")}

    def live(self, settings, steps, *, die=None, resume=True, mechanism=M, budget=BUDGET):
        """Trains from the newest checkpoint; `die` is (step, "before" | byte of the line | "after")."""
        start = max(self.checkpoints) if resume else 0
        theta, stream, known = self.checkpoints[start]
        if known != settings[0]:
            stream = stream_name(stream, settings[0], theta)
        with Ledger(self.path, budget) as ledger:
            if start:
                ledger.check_holds(start - 1, theta)
            for step in range(start, steps):
                while True:
                    made = (theta, stream, *settings, mechanism, step)
                    value = hashlib.sha256(repr(made).encode()).hexdigest()
                    if die == (step, "before"):
                        return
                    try:
                        if die and die[0] == step and isinstance(die[1], int):
                            with dying_while_writing(die[1]):
                                if not ledger.charge(step, mechanism, value, stream):
                                    raise Killed  # a replay writes nothing
                            return
                        ledger.charge(step, mechanism, value, stream)
                        break
                    except SharedNoise:
                        stream = stream_name(stream, "again", theta)
                    except BudgetExceeded:
                        return
                theta = value
                self.released.add((step, theta))
                assert self.noise.setdefault((stream, step), theta) == theta  # else their difference is bare
                if die == (step, "after"):
                    return
                if step % 4 == 3:
                    self.checkpoints[step + 1] = theta, stream, settings[0]

    def check(self):
        """No more was released than the ledger knows of, and that is within the budget."""
        with Ledger.open(self.path, read_only=True) as ledger:
            assert len(self.released) <= ledger.steps
            return ledger.steps


class TestAttacks:
    """Ways in which a restart might overspend. (Deleting the ledger itself: `check_holds`.)"""

    def test_restarting_over_and_over(self, tmp_path, remembered, allowed):
        run = Run(tmp_path / "ledger.jsonl")
        for _ in range(4):
            run.live("a1", 1000)
            assert run.check() == allowed["pld"] == len(run.released)

    def test_deleting_the_checkpoints(self, tmp_path, remembered, allowed):
        run = Run(tmp_path / "ledger.jsonl")
        run.live("a1", 10)
        run.checkpoints = {0: ("initial", "", "")}
        run.live("a1", 12)  # the same bits again, and two more
        assert run.check() == len(run.released) == 12
        run.checkpoints = {0: ("initial", "", "")}
        run.live("c1", 1000)  # all of it anew: charged again
        assert run.check() == len(run.released) == allowed["pld"]

    def test_editing_the_settings(self, tmp_path, remembered, allowed):
        run = Run(tmp_path / "ledger.jsonl")
        for settings in "abcdefgh":
            run.live(settings + "1", 15, resume=False)
        assert run.check() == len(run.released) == allowed["pld"]

    def test_settings_there_and_back(self, tmp_path, remembered, allowed):
        """A spends everything, B is refused, A again repeats its steps to the bit: nothing new is released."""
        run = Run(tmp_path / "ledger.jsonl")
        for settings in ("a1", "b1", "a1", "b1", "a1"):
            run.live(settings, 1000, resume=False)
        assert run.check() == len(run.released) == allowed["pld"]

    def test_what_nobody_thought_of(self, tmp_path, remembered, allowed):
        """The known settings are the same, the bits are not: charged, and with noise of their own."""
        run = Run(tmp_path / "ledger.jsonl")
        for settings in ("a1", "a2", "a3", "a1", "a2"):
            run.live(settings, 6, resume=False)
        assert run.check() == len(run.released) == 18 <= allowed["pld"]

    def test_editing_the_noise(self, tmp_path, remembered):
        run = Run(tmp_path / "ledger.jsonl")
        run.live("a1", 5)
        run.live("a1", 10, mechanism=OTHER)
        run.live("a1", 1000, mechanism=M)
        with Ledger.open(run.path, read_only=True) as ledger:
            assert run.check() == len(run.released) and len(ledger.events()) == 3
            assert ledger.spent <= BUDGET.epsilon

    @pytest.mark.parametrize(
        "budget, accountant",
        [
            (PrivacyBudget(0.5, DELTA), "pld"),
            (PrivacyBudget(0.25, 1e-3), "pld"),
            (FREE, "pld"),
            (BUDGET, "rdp"),
        ],
    )
    def test_editing_the_promise(self, tmp_path, budget, accountant):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, BUDGET, allowed_steps={M: 1}) as ledger:
            ledger.charge(0, M, "run")
        with pytest.raises(LedgerError, match="a promise cannot be changed"):
            Ledger(path, budget, accountant)
        assert Ledger.open(path, read_only=True).budget == BUDGET

    def test_a_hair_more_budget_at_every_restart(self, tmp_path):
        """Rounding differs between machines, so a relative 1e-9 is let pass; it must not add up."""
        path = tmp_path / "ledger.jsonl"
        for k in range(5):
            with Ledger(path, PrivacyBudget(0.25 * (1 + 1e-10 * k), DELTA)) as ledger:
                ledger.charge(0, M, "run")
                assert ledger.budget == BUDGET

    def test_resuming_twice_at_once(self, tmp_path, remembered):
        run = Run(tmp_path / "ledger.jsonl")
        run.live("a1", 6)
        with Ledger.open(run.path), pytest.raises(LedgerLocked):
            run.live("a1", 20)
        assert run.check() == 6

    def test_resuming_twice_in_turn(self, tmp_path, remembered):
        run = Run(tmp_path / "ledger.jsonl")
        run.live("a1", 10, die=(6, "after"))  # checkpoint at 4
        for last in (9, 12):
            for _ in range(2):
                run.live("a1", last)
                assert run.check() == len(run.released) == last
                run.checkpoints = {0: ("initial", "", ""), 4: run.checkpoints[4]}

    def test_an_older_ledger_beside_a_checkpoint(self, tmp_path):
        path = tmp_path / "ledger.jsonl"
        with Ledger(path, FREE) as ledger:
            charge(ledger, range(4))
            older = path.read_bytes()
            charge(ledger, range(4, 9))
            ledger.check_holds(8, "run")  # as a checkpoint has it
            charge(ledger, range(9, 11))
            ledger.check_holds(8, "run")
            with pytest.raises(LedgerError, match="got 11 steps and not that one"):
                ledger.check_holds(8, "another run")
        path.write_bytes(older)
        with Ledger(path, FREE) as ledger, pytest.raises(LedgerError, match="step 8.*got 4.*older copy"):
            ledger.check_holds(8, "run")
        path.unlink()
        with Ledger(path, FREE) as ledger, pytest.raises(LedgerError, match="got 0"):
            ledger.check_holds(8, "run")

    @pytest.mark.parametrize("seed", range(40))
    def test_any_history(self, tmp_path, remembered, allowed, seed):
        """Deaths anywhere, restarts, lost checkpoints, edited settings, in random order."""
        rng, run = random.Random(seed), Run(tmp_path / "ledger.jsonl")
        for _ in range(12):
            if rng.random() < 0.3:
                run.checkpoints = {0: ("initial", "", "")}
            elif rng.random() < 0.3:
                run.checkpoints.pop(max(run.checkpoints)) if len(run.checkpoints) > 1 else None
            start = max(run.checkpoints)
            where = rng.choice(["before", "after", 0, 1, rng.randrange(2, 300), None])
            die = None if where is None else (start + rng.randrange(8), where)
            run.live(rng.choice(["a1", "a1", "a1", "b1", "a2"]), start + rng.randrange(1, 10), die=die)
            if run.released:
                assert run.check() <= allowed["pld"]
        run.live("a1", 1000)
        assert run.check() == allowed["pld"]

    def test_continuing_the_checkpoint_of_other_settings(self, tmp_path, remembered):
        """b goes on from a's parameters, then from its own: the same step and settings, other bits and noise."""
        run = Run(tmp_path / "ledger.jsonl")
        run.live("a1", 4)
        run.live("b1", 8)
        run.live("b1", 8, resume=False)
        assert run.check() == len(run.released) == 16

    def test_the_toy_run_sees_an_overspending_ledger(self, tmp_path, remembered, monkeypatch):
        """The tests above can fail: with a ledger that forgets, they do."""
        run = Run(tmp_path / "ledger.jsonl")
        monkeypatch.setattr(Ledger, "_load", lambda self, lines, path: None)
        monkeypatch.setattr(Ledger, "_write", lambda self, line: None)
        run.live("a1", 10)
        run.path.write_text(
            '{"ledger": 2, "epsilon": "0.25", "delta": 1e-5, "accountant": "pld", "settings": ""}\n'
        )
        with pytest.raises(AssertionError):
            run.check()
