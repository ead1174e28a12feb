"""The ledger, a journal of what a run released, written before anything of it is seen."""

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
from dpnb.privacy.mechanism import DpEvent, Mechanism, MissingAccountant, PrivacyBudget, compose

VERSION = 2  # of the file format
_MECHANISM = {field.name for field in dataclasses.fields(Mechanism)}


class LedgerError(RuntimeError):
    """The ledger cannot vouch for what was spent."""


class LedgerLocked(LedgerError):
    """Another process, or another `Ledger` in this one, is writing to this ledger."""


class BudgetExceeded(LedgerError):
    """The step would spend more than was promised. Nothing was written, and the step must not be taken."""


class SharedNoise(LedgerError):
    """Another value of this step was released with the same noise. Nothing was written."""


class Ledger:
    """An append-only journal of private updates that refuses to overspend.

    Each step is one line of JSON with a hash of what the step released. The line is on disk (fsync) before `charge`
    returns, so no released value is missing, wherever the process dies. If it dies while it writes a line, the torn
    line is removed when the ledger is next opened: its `charge` never returned, so nothing was released. A line that
    lacks only its newline is kept. Each line carries a hash of all lines before it, so a line that was changed, moved
    or removed is noticed.

    Formal guarantees: the composition of all charged steps has epsilon <= budget.epsilon at budget.delta under
    `accountant`, and every released value is among them, provided that the caller
      - calls `charge` with the hash of the result of every update before anything of it leaves the process. A value
        whose hash is in the journal has been paid for, and releasing the same bits again reveals nothing new. The
        equality of the bits proves this; it is not inferred from settings;
      - names the stream from which the sampling and the noise of the step were drawn. Two values with the same noise do
        not compose, however often they are charged, so a second value is refused (`SharedNoise`). Discard it unseen
        and draw fresh noise.
    The comparison reveals one bit, whether a repetition differed, which depends on how the two programs round. A
    caller that knows that settings changed (see `dpnb.training.replay`) draws fresh noise without comparing.
    That PLD composes mechanisms is proven for a sequence that is fixed in advance. If sigma or q are changed after
    looking at results, use "rdp".
    The ledger cannot notice on its own that its file was deleted or replaced by an older copy; `check_holds` compares
    it with a step that is known to have been charged.

    Args:
      path: the journal (`ledger.jsonl`). The first charge creates it, and an existing one is continued. It is locked,
        by a file of the same name plus `.lock`, until `close`. None keeps the journal in memory. In a run of several
        processes only one has a path.
      budget: the promise. An existing ledger must have been opened with the same one.
      accountant: a name in `dpnb.privacy.ACCOUNTANTS`. An existing ledger must have been opened with the same one.
      allowed_steps: for machines without dp-accounting, the number of steps of a mechanism that fit the budget if
        nothing else runs, from `dpnb.privacy.calibrate_steps`. It is written into the journal, and a larger number that
        is passed later does not raise it. If dp-accounting is installed, a number above its own is refused.
      settings: a hash of the caller's settings. That of the first charge stays in the file.
    Raises:
      ValueError: the accountant is unknown, or a number in allowed_steps is below 1.
      LedgerLocked: another process, or another `Ledger` in this one, has the journal open.
      LedgerError: the file is damaged, or was opened with another budget or accountant.

    >>> ledger = Ledger(None, PrivacyBudget(1.0, 1e-5), "rdp")
    >>> ledger.charge(0, Mechanism(2.0, 0.01), released="hash of the result")
    True
    >>> ledger.charge(0, Mechanism(2.0, 0.01), released="hash of the result")  # the same bits are free
    False
    >>> ledger.steps, round(ledger.spent, 2)
    (1, 0.19)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        budget: PrivacyBudget,
        accountant: str = DEFAULT_ACCOUNTANT,
        *,
        allowed_steps: Mapping[Mechanism, int] | None = None,
        settings: str = "",
    ) -> None:
        find_accountant(accountant)
        self.path = None if path is None else pathlib.Path(path)
        self.budget, self.accountant = budget, accountant
        self.settings = settings  # with which the first step was, or will be, charged
        self._seen: set[tuple[int, str, Mechanism]] = set()  # (step, hash of what it released, ...)
        self._at: set[int] = set()  # steps that released something
        self._streams: set[tuple[int, str]] = set()  # (step, stream) of the noise that was used
        self._chain, self._size = "", 0  # hash of all lines of the file, and its size in bytes
        self._runs: list[tuple[Mechanism, int]] = []  # (mechanism, steps), in order
        self._counts: dict[Mechanism, int] = {}
        self._recorded: dict[Mechanism, int] = {}  # allowed_steps in the journal
        self._given = dict(allowed_steps or {})  # allowed_steps from this caller
        self._allowed: tuple[Any, int] | None = None  # cache of _affordable
        self._closed = ""  # why nothing can be charged
        self._file: int | None = None
        self._lock: int | None = None
        try:
            if self.path is not None:
                self._open(self.path)
            self._check_allowed()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> "Ledger":
        """Opens an existing ledger with the budget and the accountant in its file.

        Args:
          path: the journal.
          read_only: take no lock; the ledger then cannot charge.
        Raises:
          LedgerError: there is no such file, or it is empty or damaged.
          LedgerLocked: the journal is open elsewhere.
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
        """Pays for what one update released; to be called before anything of it leaves the process.

        Args:
          step: index of the update, >= 0.
          mechanism: what ran.
          released: hash of all bits of the result (`dpnb.training.replay.digest`).
          stream: name of the stream from which sampling and noise of this step were drawn; "" if they are known to be
            fresh.
        Returns:
          True if the step was charged. False if the same value of the step is in the journal already: it reveals
          nothing new and is free. A different value is charged in full.
        Raises:
          SharedNoise: this stream gave another value of this step; nothing is written.
          BudgetExceeded: the step would overspend; nothing is written.
          LedgerError: the ledger is closed, for example because writing to it failed, or its file was changed from
            outside.
          MissingAccountant: dp-accounting is not installed, and `allowed_steps` does not cover this case.
          ValueError, TypeError: an argument is not as stated above.
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
        """Checks that one more step of `mechanism` fits the budget.

        Raises:
          BudgetExceeded: it would overspend.
        """
        if self.budget.epsilon < math.inf and self.remaining(mechanism) < 1:
            raise BudgetExceeded(
                f"step {step} with {mechanism} would exceed {self.budget} under {self.accountant}: "
                f"{self.steps} steps are spent and no more of these fit; the run ends here"
            )

    def may_repeat(self, step: int) -> bool:
        """Whether a value of this step has been released, so that releasing it again would be free."""
        return step in self._at

    def remaining(self, mechanism: Mechanism) -> int:
        """How many more steps of `mechanism` fit the budget. Takes seconds if the mechanism is new."""
        return self._affordable(mechanism) - self._counts.get(mechanism, 0)

    @property
    def steps(self) -> int:
        """The number of charges. A step that was charged twice counts twice."""
        return sum(self._counts.values())

    @property
    def extra(self) -> int:
        """The number of charges beyond one per step, for repetitions that were not the same."""
        return self.steps - len(self._at)

    @property
    def spent(self) -> float:
        """The epsilon of all charged steps, under the ledger's accountant and at the budget's delta."""
        return self.epsilon(self.accountant)

    @property
    def is_exactly_accounted(self) -> bool:
        """Whether every step ran the sampler that is accounted; otherwise every epsilon is nominal."""
        return all(m.is_exactly_accounted for m in self._counts)

    def epsilon(self, accountant: str) -> float:
        """The epsilon of all charged steps at the budget's delta. Errors are those of `dpnb.privacy.epsilon`."""
        return epsilon(self.to_event(), 1, self.budget.delta, accountant) if self._counts else 0.0

    def to_event(self) -> DpEvent:
        """The composed dp_accounting DpEvent of all charged steps."""
        return compose(self._counts)

    def events(self) -> list[dict[str, Any]]:
        """The charged steps in order, run-length coded: the fields of `Mechanism`, and `steps`.

        Result records contain this list; `dpnb.privacy.events_from_json` turns it into a DpEvent.
        """
        return [{**dataclasses.asdict(m), "steps": n} for m, n in self._runs]

    def check_holds(self, step: int, released: str) -> None:
        """Checks that this value of a step, found elsewhere (in a checkpoint), was charged here.

        Raises:
          LedgerError: it was not, so the journal was deleted or is an older copy.
        """
        if not any((at, what) == (step, released) for at, what, _ in self._seen):
            raise LedgerError(
                f"the ledger {self.path or 'in memory'} must hold step {step} as the checkpoint has it, got "
                f"{self.steps} steps and not that one; it was deleted or is an older copy: restore it"
            )

    def close(self, why: str = "is closed") -> None:
        """Releases the lock. Nothing can be charged afterwards; reading still works."""
        self._closed = self._closed or why
        for name in ("_file", "_lock"):
            if getattr(self, name, None) is not None:
                os.close(getattr(self, name))
                setattr(self, name, None)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed = getattr(self, "_closed", "")
        self.close()

    def _affordable(self, mechanism: Mechanism) -> int:
        """The total number of steps of `mechanism` that fit beside the steps of the other mechanisms."""
        others = {m: n for m, n in self._counts.items() if m != mechanism}
        if self._allowed is None or self._allowed[0] != (mechanism, others):
            given = self._given.get(mechanism, self._recorded.get(mechanism))
            try:
                n = affordable_steps(self.budget, mechanism, self.accountant, others)
            except MissingAccountant:
                if given is None or others:
                    raise
                n = given
            if mechanism in self._given and not others and self._given[mechanism] > n:
                raise LedgerError(f"allowed_steps must fit {self.budget}: {n} of {mechanism} do, got {given}")
            n = min(n, self._given.get(mechanism, n))
            self._allowed = ((mechanism, others), n)
        return self._allowed[1]

    def _check_allowed(self) -> None:
        """Refuses numbers of steps that are not positive or that would raise those in the journal."""
        for mechanism, n in self._given.items():
            if operator.index(n) < 1:
                raise ValueError(f"allowed_steps must be at least 1, got {n}")
            recorded = self._recorded.get(mechanism)
            if recorded is not None and n > recorded:
                raise LedgerError(
                    f"{self.path} allows {recorded} steps of {mechanism}, as was said when it was created; "
                    f"allowed_steps cannot raise it to {n}"
                )

    def _open(self, path: pathlib.Path) -> None:
        """Locks the journal at `path`, repairs its last line and loads it, if it exists."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: the journal itself may be replaced by an editor or by rsync.
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LedgerLocked(
                    f"{path} must have one writer, but another process or another Ledger here has it "
                    "open; end that one (in a notebook: close() it, or restart the kernel)"
                ) from None
            warnings.warn(f"{path} cannot be locked ({error}): let one process use it", stacklevel=4)
        if not path.exists():
            return  # nothing is written before the first charge
        self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        data = path.read_bytes()
        lines, sound = _parse(data, path)
        if sound != data:
            os.ftruncate(self._file, min(len(sound), len(data)))
            os.write(self._file, sound[len(data) :])
            os.fsync(self._file)
        self._size = len(sound)
        if not lines:
            return
        budget, accountant, self.settings = _header(lines[0], path)
        same = [math.isclose(getattr(budget, k), getattr(self.budget, k)) for k in ("epsilon", "delta")]
        if not all(same) or accountant != self.accountant:
            raise LedgerError(
                f"{path} was opened for {budget} under {accountant}, and a promise cannot be changed "
                f"afterwards, got {self.budget} under {self.accountant}; go on with the recorded ones, or "
                "start another run in another directory (whose epsilon adds to this one's)"
            )
        self.budget = budget  # to the last digit
        self._load(lines, path)

    def _load(self, lines: list[dict[str, Any]], path: pathlib.Path) -> None:
        """Takes over the steps in the lines of a journal, after checking the hash of each line."""
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

    def _add(self, step: int, released: str, mechanism: Mechanism, stream: str) -> None:
        """Counts a charged step in memory."""
        if not self._runs or self._runs[-1][0] != mechanism:
            self._runs.append((mechanism, 0))
        self._seen.add((step, released, mechanism))
        self._at.add(step)
        self._streams.add((step, stream))
        self._counts[mechanism] = self._counts.get(mechanism, 0) + 1
        self._runs[-1] = (mechanism, self._runs[-1][1] + 1)

    def _append(self, line: dict[str, Any]) -> None:
        """Writes one more line, after the lines with which the file must begin."""
        if self.path is None:
            return
        first: list[dict[str, Any]] = []
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

    def _write(self, data: bytes) -> None:
        """Appends `data` to the file, which the first call creates, and syncs it to disk."""
        assert self.path is not None, "a ledger in memory has no file"
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        self._check_untouched(self.path, self._file)
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, "the line was written in part", str(self.path))
        os.fsync(self._file)
        self._size += len(data)

    def _check_untouched(self, path: pathlib.Path, file: int) -> None:
        """Checks that `path` is still the open file, and as long as this writer left it."""
        mine = os.fstat(file)
        try:
            there: os.stat_result | None = os.stat(path)
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino, there.st_size) != (
            mine.st_dev,
            mine.st_ino,
            self._size,
        ):
            raise LedgerError(
                f"{path} must not be changed from outside while it is open, but was replaced, deleted or written to; "
                "restore the one with the most lines and start again"
            )


def _chained(chain: str, line: Mapping[str, Any]) -> str:
    """The hash that a line carries, of all lines before it and of its own content."""
    return hashlib.sha256(json.dumps([chain, line], sort_keys=True).encode()).hexdigest()[:32]


def _parse(data: bytes, path: pathlib.Path) -> tuple[list[dict[str, Any]], bytes]:
    """The lines of a journal, and its bytes with the last line repaired.

    A torn write leaves a line without a newline. Such a line is a JSON object only if nothing but the newline is
    missing, because the closing brace comes last.
    """
    tail = data[data.rfind(b"\n") + 1 :]
    sound = data + b"\n" if tail and _object(tail) else data[: len(data) - len(tail)]
    lines = [_object(text) for text in sound.split(b"\n")[:-1]]
    if None in lines:
        raise _damaged(path, lines.index(None) + 1)
    return [line for line in lines if line is not None], sound


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object in `text`, None if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def _header(line: dict[str, Any], path: pathlib.Path) -> tuple[PrivacyBudget, str, str]:
    """(budget, accountant, settings of the first charge), from the first line of a journal."""
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


def _damaged(path: pathlib.Path, number: int) -> LedgerError:
    """The error for a line that no ledger wrote."""
    return LedgerError(
        f"{path}: line {number} must be one that a Ledger wrote, but is damaged or edited; what was spent is "
        "not known. Restore a backup that is not older; never delete the line"
    )
