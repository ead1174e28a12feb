"""The ledger: what was really released, written down before anything of it is seen."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import operator
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from dpnb.files import sync_folder
from dpnb.privacy.accounting import ACCOUNTANTS, DEFAULT_ACCOUNTANT, epsilon, find_accountant
from dpnb.privacy.calibration import affordable_steps
from dpnb.privacy.mechanism import Mechanism, MissingAccountant, PrivacyBudget, compose

VERSION = 2  # of the file
_MECHANISM = {field.name for field in dataclasses.fields(Mechanism)}


class LedgerError(RuntimeError):
    """The ledger cannot vouch for what was spent."""


class LedgerLocked(LedgerError):
    """Somebody else is writing to this ledger."""


class BudgetExceeded(LedgerError):
    """The step would spend more than was promised. Nothing was written and it must not be taken."""


class SharedNoise(LedgerError):
    """Another value of this step was released with the very same noise. Nothing was written."""


class Ledger:
    """An append-only journal of private updates that refuses to overspend.

    One line of JSON a step, with a hash of what the step released, on disk (fsync) before `charge`
    returns, so that no released value is ever missing, wherever the process dies. A last line that was
    torn by dying in the middle of it is removed on opening: its `charge` never returned, so nothing was
    released. One that lacks nothing but its newline is kept. Each line carries a hash of all lines
    before it, so that a line that was changed, moved or taken out is noticed.

    Formal guarantees: the composition of all charged steps has epsilon <= budget.epsilon at
    budget.delta under `accountant`, and every released value is among them, provided that the caller
      - calls `charge` with the hash of every update's result before anything of it leaves the process:
        a value whose hash is here has been paid for, and releasing the same bits again tells nothing new.
        This is proven by the bits and inferred from no list of settings;
      - names the stream that sampling and noise of the step were drawn from. Two values with the same
        noise do not compose at all, however often they are charged, so that a second one is refused
        (`SharedNoise`): throw it away unseen, and draw afresh.
    What is compared leaves one trace: that a repetition differed at all, which depends on how the two
    programs round. Whoever knows that settings changed (see `dpnb.training.replay`) draws afresh without comparing.
    That PLD composes mechanisms is proven for a sequence that is fixed beforehand: if sigma or q are changed after
    looking at results, go by "rdp".
    A copied or deleted file can vouch for nothing; `check_holds` notices an older one.

    Args:
      path: of the journal (`ledger.jsonl`), created by the first charge, continued where it exists, and
        locked (by a file of that name and `.lock`) until `close`; None keeps it in memory. In a run of
        several processes only one has a path.
      budget: the promise. An existing ledger must have been opened with the same.
      accountant: a name in `dpnb.privacy.ACCOUNTANTS`, likewise.
      allowed_steps: for machines without dp-accounting: how many steps of which mechanism fit the
        budget when nothing else is run, from `dpnb.privacy.calibrate_steps`. Written into the journal,
        and never raised by passing a larger number later; where dp-accounting is installed, its own
        number counts.
      settings: hash of the settings of whoever opens it; those of the first charge stay in the file.
    Raises:
      ValueError: an unknown accountant, or allowed_steps below 1.
      LedgerLocked: another process, or another `Ledger` in this one, has it open.
      LedgerError: the file is damaged, or was opened with another budget.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        budget: PrivacyBudget,
        accountant: str = DEFAULT_ACCOUNTANT,
        *,
        allowed_steps: Mapping[Mechanism, int] | None = None,
        settings: str = "",
    ):
        find_accountant(accountant)
        self.path = None if path is None else pathlib.Path(path)
        self.budget, self.accountant = budget, accountant
        self.settings = settings  # under which the first step was, or would be, charged
        self._seen: set[tuple[int, str, Mechanism]] = set()  # (step, hash of what it released, ...)
        self._at: set[int] = set()  # steps of which something was released
        self._streams: set[tuple[int, str]] = set()  # the noise that was used
        self._chain, self._size = "", 0  # of the file: hash of all lines, bytes
        self._runs: list[list] = []  # [mechanism, steps], in order
        self._counts: dict[Mechanism, int] = {}
        self._recorded: dict[Mechanism, int] = {}  # precomputed numbers of steps, in the journal
        self._given = dict(allowed_steps or {})  # the same, from this caller
        self._allowed: tuple[Any, int] | None = None  # cache of _affordable
        self._closed, self._file, self._lock = "", None, None
        try:
            if self.path is not None:
                self._open()
            self._check_allowed()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike, *, read_only: bool = False) -> "Ledger":
        """An existing ledger with the budget it was created with; `read_only` takes no lock.

        Raises:
          LedgerError: no such file, or nothing readable in it.
        """
        path = pathlib.Path(path)
        if not path.exists():
            raise LedgerError(f"{path} must be an existing ledger, got no such file; is the directory right?")
        lines, _ = _parse(path.read_bytes(), path)
        if not lines:
            raise LedgerError(f"{path} must begin with the line of its budget, got nothing; start anew")
        budget, accountant, settings = _header(lines[0], path)
        if not read_only:
            return cls(path, budget, accountant)
        ledger = cls(None, budget, accountant, settings=settings)
        ledger._load(lines, path)
        ledger.path, ledger._closed = path, "was opened to read only"
        return ledger

    def charge(self, step: int, mechanism: Mechanism, released: str, stream: str = "") -> bool:
        """Pays for what one update released, before anything of it leaves the process.

        Args:
          step: index of the update, >= 0.
          mechanism: what ran.
          released: hash of the result, to the bit (`dpnb.training.replay.digest`).
          stream: name of what sampling and noise were drawn from at this step; "" if they are known to be
            fresh.
        Returns:
          True if it was charged; False if this very value of the step is in the journal already, which
          reveals nothing new and is free. Another value is charged in full.
        Raises:
          SharedNoise: this stream gave another value of this step; nothing is written.
          BudgetExceeded: it would overspend; nothing is written.
          LedgerError: the ledger is closed, for instance because writing to it failed, or its file was
            changed by somebody else.
          MissingAccountant: dp-accounting is missing and `allowed_steps` does not cover this case.
        """
        if self._closed:
            raise LedgerError(f"the ledger {self.path or 'in memory'} {self._closed}; open it anew to charge")
        if operator.index(step) < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if not isinstance(mechanism, Mechanism) or not isinstance(released, str) or not released:
            raise TypeError(
                f"charge takes a Mechanism and a hash that is a string, not empty, "
                f"got {mechanism!r} and {released!r}"
            )
        key = (int(step), released, mechanism)
        if key in self._seen:
            return False
        if stream and (key[0], stream) in self._streams:
            raise SharedNoise(
                f"step {step} was released before with the noise of stream {stream[:16]} and must be the same to the "
                "bit, but is not; throw the new value away and draw afresh"
            )
        self.check_affordable(step, mechanism)
        line = {"step": key[0], "released": released, "stream": stream, **dataclasses.asdict(mechanism)}
        try:
            self._append(line)
            self._add(*key, stream)
        except BaseException:  # disk full, interrupted: memory and file may differ, opening anew repairs it
            self.close("was closed as writing to it failed")
            raise
        return True

    def check_affordable(self, step: int, mechanism: Mechanism) -> None:
        """Raises BudgetExceeded if one more step of `mechanism` would overspend."""
        if self.budget.epsilon < math.inf and self.remaining(mechanism) < 1:
            raise BudgetExceeded(
                f"step {step} with {mechanism} would exceed {self.budget} under {self.accountant}: "
                f"{self.steps} steps are spent and no more of these fit; the run ends here"
            )

    def may_repeat(self, step: int) -> bool:
        """Whether some value of this step has been released, so that the same again would be free."""
        return step in self._at

    def remaining(self, mechanism: Mechanism) -> int:
        """How many more steps of `mechanism` fit the budget; slow (seconds) only when it is a new one."""
        return self._affordable(mechanism) - self._counts.get(mechanism, 0)

    @property
    def steps(self) -> int:
        """Number of steps charged, those charged twice counted twice."""
        return sum(self._counts.values())

    @property
    def extra(self) -> int:
        """Number of charges beyond one for each step: of repetitions that were not the same."""
        return self.steps - len(self._at)

    @property
    def spent(self) -> float:
        """Epsilon of all charged steps under the ledger's accountant, at the budget's delta."""
        return self.epsilon(self.accountant)

    @property
    def is_exactly_accounted(self) -> bool:
        """Whether every step ran the sampler that is accounted; else every epsilon is nominal."""
        return all(m.is_exactly_accounted for m in self._counts)

    def epsilon(self, accountant: str) -> float:
        """Epsilon of all charged steps at the budget's delta; raises as `dpnb.privacy.epsilon`."""
        return epsilon(self.to_event(), 1, self.budget.delta, accountant) if self._counts else 0.0

    def to_event(self):
        """The composed dp_accounting DpEvent of all charged steps."""
        return compose(self._counts)

    def events(self) -> list[dict[str, Any]]:
        """The steps in the order of charging, run-length coded: fields of `Mechanism`, and `steps`.

        For result records; `dpnb.privacy.events_from_json` makes a DpEvent of it.
        """
        return [{**dataclasses.asdict(m), "steps": n} for m, n in self._runs]

    def check_holds(self, step: int, released: str) -> None:
        """Raises LedgerError if this value of a step, found elsewhere (a checkpoint), was not charged here."""
        if not any((at, what) == (step, released) for at, what, _ in self._seen):
            raise LedgerError(
                f"the ledger {self.path or 'in memory'} must hold step {step} as the checkpoint has it, got "
                f"{self.steps} steps and not that one; it was deleted or is an older copy: restore it"
            )

    def close(self, why: str = "is closed") -> None:
        """Releases the lock; reading still works."""
        self._closed = self._closed or why
        for name in ("_file", "_lock"):
            if getattr(self, name, None) is not None:
                os.close(getattr(self, name))
                setattr(self, name, None)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        self._closed = getattr(self, "_closed", "")
        self.close()

    def _affordable(self, mechanism):
        """Number of steps of `mechanism` in all that fit beside the other mechanisms' steps."""
        others = {m: n for m, n in self._counts.items() if m != mechanism}
        if self._allowed is None or self._allowed[0] != (mechanism, others):
            given = self._given.get(mechanism, self._recorded.get(mechanism))
            try:
                n = affordable_steps(self.budget, mechanism, self.accountant, others)
            except MissingAccountant:
                if given is None or others:
                    raise
                n = given
            if mechanism in self._given and not others and given > n:
                raise LedgerError(f"allowed_steps must fit {self.budget}: {n} of {mechanism} do, got {given}")
            n = min(n, self._given.get(mechanism, n))
            self._allowed = ((mechanism, others), n)
        return self._allowed[1]

    def _check_allowed(self):
        for mechanism, n in self._given.items():
            if operator.index(n) < 1:
                raise ValueError(f"allowed_steps must be at least 1, got {n}")
            recorded = self._recorded.get(mechanism)
            if recorded is not None and n > recorded:
                raise LedgerError(
                    f"{self.path} allows {recorded} steps of {mechanism}, as was said when it was created; "
                    f"allowed_steps cannot raise it to {n}"
                )

    def _open(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: the journal itself may be replaced by an editor or by rsync.
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LedgerLocked(
                    f"{self.path} must have one writer, but another process or another Ledger here has it "
                    "open; end that one (in a notebook: close() it, or restart the kernel)"
                ) from None
            warnings.warn(f"{self.path} cannot be locked ({error}): let one process use it", stacklevel=4)
        if not self.path.exists():
            return  # nothing is written before the first charge
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        data = self.path.read_bytes()
        lines, sound = _parse(data, self.path)
        if sound != data:
            os.ftruncate(self._file, min(len(sound), len(data)))
            os.write(self._file, sound[len(data) :])
            os.fsync(self._file)
        self._size = len(sound)
        if not lines:
            return
        budget, accountant, self.settings = _header(lines[0], self.path)
        same = [math.isclose(getattr(budget, k), getattr(self.budget, k)) for k in ("epsilon", "delta")]
        if not all(same) or accountant != self.accountant:
            raise LedgerError(
                f"{self.path} was opened for {budget} under {accountant}, and a promise cannot be changed "
                f"afterwards, got {self.budget} under {self.accountant}; go on with the recorded ones, or "
                "start another run in another directory (whose epsilon adds to this one's)"
            )
        self.budget = budget  # to the last digit
        self._load(lines, self.path)

    def _load(self, lines, path):
        for number, line in enumerate(lines, start=1):
            line = dict(line)
            chain, self._chain = line.pop("chain", None), _chained(self._chain, line)
            if chain != self._chain:
                raise _damaged(path, number)
            if number == 1:
                continue
            try:
                mechanism = Mechanism(**{name: line.pop(name) for name in _MECHANISM})
                if line.keys() == {"allowed_steps"}:
                    n = operator.index(line["allowed_steps"])
                    self._recorded[mechanism] = min(n, self._recorded.get(mechanism, n))
                else:
                    key = operator.index(line.pop("step")), line.pop("released"), mechanism
                    stream = line.pop("stream")
                    if line or not isinstance(key[1], str) or not isinstance(stream, str):
                        raise ValueError(f"unexpected {line or key[1]!r}")
                    if key not in self._seen:
                        self._add(*key, stream)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, number) from error

    def _add(self, step, released, mechanism, stream):
        if not self._runs or self._runs[-1][0] != mechanism:
            self._runs.append([mechanism, 0])
        self._seen.add((step, released, mechanism))
        self._at.add(step)
        self._streams.add((step, stream))
        self._counts[mechanism] = self._counts.get(mechanism, 0) + 1
        self._runs[-1][1] += 1

    def _append(self, line: dict):
        """One more line of the file, after those that it must begin with."""
        if self.path is None:
            return
        first = []
        if not self._chain:
            budget = {"epsilon": str(self.budget.epsilon), "delta": self.budget.delta}
            first.append(
                {"ledger": VERSION, **budget, "accountant": self.accountant, "settings": self.settings}
            )
        for mechanism, n in self._given.items():
            if mechanism not in self._recorded:
                first.append({"allowed_steps": int(n), **dataclasses.asdict(mechanism)})
                self._recorded[mechanism] = int(n)
        data = b""
        for each in (*first, line):
            self._chain = _chained(self._chain, each)
            data += json.dumps({**each, "chain": self._chain}).encode() + b"\n"
        self._write(data)

    def _write(self, data: bytes):
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        self._check_untouched()
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, "the line was written in part", str(self.path))
        os.fsync(self._file)
        self._size += len(data)

    def _check_untouched(self):
        """The file of that name is the one that is open, and as long as this writer left it."""
        mine = os.fstat(self._file)
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino, there.st_size) != (
            mine.st_dev,
            mine.st_ino,
            self._size,
        ):
            raise LedgerError(
                f"{self.path} must be changed by nobody while it is open, but was replaced, deleted or written to; "
                "restore the one with the most lines and start again"
            )


def _chained(chain: str, line: Mapping[str, Any]) -> str:
    """The hash that a line carries: of all lines before it, and of what it says itself."""
    return hashlib.sha256(json.dumps([chain, line], sort_keys=True).encode()).hexdigest()[:32]


def _parse(data: bytes, path) -> tuple[list[dict], bytes]:
    """The lines of a journal, and its bytes with the last line repaired.

    What a torn write leaves has no newline, and is not a JSON object unless only that is missing,
    as the brace closes last.
    """
    tail = data[data.rfind(b"\n") + 1 :]
    sound = data + b"\n" if tail and _object(tail) else data[: len(data) - len(tail)]
    lines = [_object(text) for text in sound.split(b"\n")[:-1]]
    if None in lines:
        raise _damaged(path, lines.index(None) + 1)
    return lines, sound


def _object(text: bytes) -> dict | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None


def _header(line: dict, path) -> tuple[PrivacyBudget, str, str]:
    """(budget, accountant, settings of the first charge)."""
    version = line.get("ledger")
    if version == 1:
        raise LedgerError(
            f"{path} must be a version {VERSION} ledger, got version 1, which does not say what each step released, so "
            "that no repetition can be proven; start the run in another directory (whose epsilon adds to this one's)"
        )
    try:
        accountant, settings = line["accountant"], line["settings"] if version == VERSION else ""
        budget = PrivacyBudget(float(line["epsilon"]), line["delta"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, 1) from error
    if version != VERSION or accountant not in ACCOUNTANTS:
        raise LedgerError(
            f"{path} must be a version {VERSION} ledger, got {version!r}, {accountant!r}; update dpnb"
        )
    return budget, accountant, settings


def _damaged(path, number: int) -> LedgerError:
    return LedgerError(
        f"{path}: line {number} must be one that a Ledger wrote, but is damaged or edited; what was spent is "
        "not known. Restore a backup that is not older; never delete the line"
    )
