"""The ledger: what was really executed, written down before it happens; and the statement about it."""

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
from collections.abc import Iterable, Mapping
from typing import Any

from dpnb.privacy import (
    ACCOUNTANTS,
    Mechanism,
    MissingAccountant,
    PrivacyBudget,
    affordable_steps,
    compose,
    counts_from_json,
    epsilon,
)

_MECHANISM = {field.name for field in dataclasses.fields(Mechanism)}


class LedgerError(RuntimeError):
    """The ledger cannot vouch for what was spent."""


class LedgerLocked(LedgerError):
    """Somebody else is writing to this ledger."""


class BudgetExceeded(LedgerError):
    """The step would spend more than was promised. Nothing was written and it must not be taken."""


class Ledger:
    """An append-only journal of private updates that refuses to overspend.

    One line of JSON a step, on disk (fsync) before `charge` returns, so that no released value is
    ever missing, wherever the process dies. A last line that was torn by dying in the middle of it
    is removed on opening: its `charge` never returned, so nothing was released. One that lacks
    nothing but its newline is kept.

    Formal guarantees: the composition of all charged steps has epsilon <= budget.epsilon at
    budget.delta under `accountant`, provided that the caller
      - calls `charge` before the noisy gradient exists, for every update;
      - puts everything that determines the released bits into the fingerprint (settings, seed, data,
        code and library versions, device, and the parameters before the step, or the `lineage` that
        led to them), as an equal one is taken for a replay and is free;
      - draws sampling and noise afresh where the fingerprint differs (`derived_seed`): releases that
        share their noise do not compose at all, however often they are charged.
    A copied or deleted file can vouch for nothing; `check_includes` notices an older one.

    Args:
      path: of the journal (`ledger.jsonl`), created where missing, continued where not, and locked
        until `close`; None keeps it in memory. In a run of several processes only one has a path.
      budget: the promise. An existing ledger must have been opened with the same.
      accountant: "pld" or "rdp", likewise.
      allowed_steps: for machines without dp-accounting: how many steps of which mechanism fit the
        budget when nothing else is run, from `dpnb.privacy.calibrate_steps`. Written into the journal,
        and never raised by passing a larger number later; where dp-accounting is installed, its own
        number counts.
    Raises:
      LedgerLocked: another process, or another `Ledger` in this one, has it open.
      LedgerError: the file is damaged, or was opened with another budget.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        budget: PrivacyBudget,
        accountant: str = "pld",
        *,
        allowed_steps: Mapping[Mechanism, int] | None = None,
    ):
        if accountant not in ACCOUNTANTS:
            raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}")
        self.path = None if path is None else pathlib.Path(path)
        self.budget, self.accountant = budget, accountant
        self._seen: set[tuple[int, str, Mechanism]] = set()
        self._runs: list[list] = []  # [mechanism, steps], in order
        self._counts: dict[Mechanism, int] = {}
        self._recorded: dict[Mechanism, int] = {}  # precomputed numbers of steps, in the journal
        self._given = dict(allowed_steps or {})  # the same, from this caller
        self._allowed: tuple[Any, int] | None = None  # cache of _affordable
        self._closed, self._file = "", None
        try:
            if self.path is not None:
                self._open()
            self._record_allowed()
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
        budget, accountant = _header(lines[0], path)
        if not read_only:
            return cls(path, budget, accountant)
        ledger = cls(None, budget, accountant)
        ledger._load(lines, path)
        ledger.path, ledger._closed = path, "was opened to read only"
        return ledger

    def charge(self, step: int, mechanism: Mechanism, fingerprint: str) -> bool:
        """Pays for one update, before it happens.

        Args:
          step: index of the update, >= 0.
          mechanism: what is about to run.
          fingerprint: hash of all that determines the value to be released (see the class).
        Returns:
          True if it was charged; False if this very step is in the journal already, so that the
          update is a bit-identical replay, which reveals nothing new and is free. The same step
          with another fingerprint or mechanism is charged in full.
        Raises:
          BudgetExceeded: it would overspend; nothing is written.
          LedgerError: the ledger is closed, for instance because writing to it failed.
          MissingAccountant: dp-accounting is missing and `allowed_steps` does not cover this case.
        """
        if self._closed:
            raise LedgerError(f"the ledger {self.path or 'in memory'} {self._closed}; open it anew to charge")
        if operator.index(step) < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if not isinstance(mechanism, Mechanism) or not isinstance(fingerprint, str) or not fingerprint:
            raise TypeError(
                f"charge takes a Mechanism and a fingerprint that is a string, not empty, "
                f"got {mechanism!r} and {fingerprint!r}"
            )
        key = (int(step), fingerprint, mechanism)
        if key in self._seen:
            return False
        if self.budget.epsilon < math.inf and self.remaining(mechanism) < 1:
            raise BudgetExceeded(
                f"step {step} with {mechanism} would exceed {self.budget} under {self.accountant}: "
                f"{self.steps} steps are spent and no more of these fit; the run ends here"
            )
        try:
            self._write({"step": key[0], "fingerprint": fingerprint, **dataclasses.asdict(mechanism)})
            self._add(*key)
        except BaseException:  # disk full, interrupted: memory and file may differ, opening anew repairs it
            self.close("was closed as writing to it failed")
            raise
        return True

    def remaining(self, mechanism: Mechanism) -> int:
        """How many more steps of `mechanism` fit the budget; slow (seconds) only when it is a new one."""
        return self._affordable(mechanism) - self._counts.get(mechanism, 0)

    @property
    def steps(self) -> int:
        """Number of steps charged, those charged twice counted twice."""
        return sum(self._counts.values())

    @property
    def spent(self) -> float:
        """Epsilon of all charged steps under the ledger's accountant, at the budget's delta."""
        return self.epsilon(self.accountant)

    @property
    def valid(self) -> bool:
        """Whether every step ran the sampler that is accounted; else every epsilon is nominal."""
        return all(m.valid for m in self._counts)

    def epsilon(self, accountant: str) -> float:
        """Epsilon of all charged steps at the budget's delta (`MissingAccountant` without dp-accounting)."""
        return epsilon(self.to_event(), 1, self.budget.delta, accountant) if self._counts else 0.0

    def to_event(self):
        """The composed dp_accounting DpEvent of all charged steps."""
        return compose(self._counts)

    def events(self) -> list[dict[str, Any]]:
        """The steps in the order of charging, run-length coded: fields of `Mechanism`, and `steps`.

        For result records; `dpnb.privacy.events_from_json` makes a DpEvent of it.
        """
        return [{**dataclasses.asdict(m), "steps": n} for m, n in self._runs]

    def check_includes(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Raises LedgerError if `events`, remembered elsewhere (a checkpoint), are not all in here."""
        for mechanism, n in counts_from_json(events).items():
            have = self._counts.get(mechanism, 0)
            if have < n:
                raise LedgerError(
                    f"the ledger {self.path or 'in memory'} must hold the {n} steps of {mechanism} that the "
                    f"checkpoint knows of, got {have}; it was deleted or is an older copy: restore it"
                )

    def close(self, why: str = "is closed") -> None:
        """Releases the lock; reading still works."""
        self._closed = self._closed or why
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(self._file)

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

    def _record_allowed(self):
        for mechanism, n in self._given.items():
            if operator.index(n) < 1:
                raise ValueError(f"allowed_steps must be at least 1, got {n}")
            recorded = self._recorded.get(mechanism)
            if recorded is None:
                self._write({"allowed_steps": int(n), **dataclasses.asdict(mechanism)})
                self._recorded[mechanism] = int(n)
            elif n > recorded:
                raise LedgerError(
                    f"{self.path} allows {recorded} steps of {mechanism}, as was said when it was created; "
                    f"allowed_steps cannot raise it to {n}"
                )

    def _open(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise LedgerLocked(
                    f"{self.path} must have one writer, but another process or another Ledger here has it "
                    "open; end that one (in a notebook: close() it, or restart the kernel)"
                ) from None
            warnings.warn(f"{self.path} cannot be locked ({error}): let one process use it", stacklevel=4)
        data = self.path.read_bytes()
        lines, sound = _parse(data, self.path)
        if sound != data:
            os.ftruncate(self._file, min(len(sound), len(data)))
            os.write(self._file, sound[len(data) :])
            os.fsync(self._file)
        if not lines:
            budget = {"epsilon": str(self.budget.epsilon), "delta": self.budget.delta}
            self._write({"ledger": 1, **budget, "accountant": self.accountant})
            directory = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
            return
        budget, accountant = _header(lines[0], self.path)
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
        for number, line in enumerate(lines[1:], start=2):
            try:
                mechanism = Mechanism(**{name: line.pop(name) for name in _MECHANISM})
                if line.keys() == {"allowed_steps"}:
                    n = operator.index(line["allowed_steps"])
                    self._recorded[mechanism] = min(n, self._recorded.get(mechanism, n))
                else:
                    key = operator.index(line.pop("step")), line.pop("fingerprint"), mechanism
                    if line or not isinstance(key[1], str):
                        raise ValueError(f"unexpected {line or key[1]!r}")
                    if key not in self._seen:
                        self._add(*key)
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, number) from error

    def _add(self, step, fingerprint, mechanism):
        if not self._runs or self._runs[-1][0] != mechanism:
            self._runs.append([mechanism, 0])
        self._seen.add((step, fingerprint, mechanism))
        self._counts[mechanism] = self._counts.get(mechanism, 0) + 1
        self._runs[-1][1] += 1

    def _write(self, line: dict):
        if self._file is None:
            return
        data = json.dumps(line).encode() + b"\n"
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, "the line was written in part", str(self.path))
        os.fsync(self._file)


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
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None


def _header(line: dict, path) -> tuple[PrivacyBudget, str]:
    try:
        version, accountant = line["ledger"], line["accountant"]
        budget = PrivacyBudget(float(line["epsilon"]), line["delta"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, 1) from error
    if version != 1 or accountant not in ACCOUNTANTS:
        raise LedgerError(f"{path} must be a version 1 ledger, got {version!r}, {accountant!r}; update dpnb")
    return budget, accountant


def _damaged(path, number: int) -> LedgerError:
    return LedgerError(
        f"{path}: line {number} must be one that a Ledger wrote, but is damaged or edited; what was spent is "
        "not known. Restore a backup that is not older; never delete the line"
    )


def lineage(previous: str, fingerprint: str) -> str:
    """The fingerprint of a step that also stands for every step before it; "" before the first.

    `fingerprint` alone would not tell a run from one that continued another's checkpoint with its
    settings: the same step, but other parameters. Keep the value in the checkpoint:

    >>> state = ""
    >>> for step in range(3):
    ...     state = lineage(state, "settings, seed, data, device")  # then charge(step, mechanism, state)
    >>> state[:8]
    'a5f3dd0d'
    """
    return hashlib.sha256(json.dumps([previous, fingerprint]).encode()).hexdigest()


def derived_seed(seed: int, fingerprint: str) -> int:
    """A seed in [0, 2**63) for sampling and noise: afresh whenever the fingerprint differs.

    Two releases that share the noise but not the settings differ by a bare function of the data;
    deriving the seed from both makes them independent, as composition needs. It is as secret as
    `seed` is.
    """
    return int.from_bytes(hashlib.sha256(f"{int(seed)} {fingerprint}".encode()).digest()[:8]) >> 1
