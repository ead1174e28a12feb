"""Chooses the noise that a run draws, and proves that a repeated update is the same.

Sampling and noise of a run come from a stream, whose seed is derived from the run's seed and the stream's
name. An uninterrupted run has one stream. A run that continues from a checkpoint under the same settings
stays in its stream, and repeats lost updates to the bit, which the ledger verifies by a hash of the result.
Under other settings (code, versions, hardware ...), which may round differently, it continues in a new
stream. No list of settings is complete: if a repetition is not the same after all, it is thrown away unseen
and drawn afresh.
"""

import hashlib

import jax
import numpy as np

from dpnb.privacy import BudgetExceeded, Ledger, Mechanism, SharedNoise, derived_seed
from dpnb.training.hosts import call_on_process_0
from dpnb.training.seeds import stream_name
from dpnb.training.sharding import fetch_replicated
from dpnb.training.state import BatchMetrics, State
from dpnb.training.update import Trainer, one_update, reseeded

PAID, REFUSED, AFRESH = "paid", "refused", "afresh"


def digest(state: State) -> str:
    """Returns the SHA-256 (hex) of all that an update releases: parameters, averages, optimizer, step.

    Every process has to call it. The random key is left out.
    """
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state._replace(key=())):
        x = np.asarray(fetch_replicated(leaf))
        found.update(f"{x.dtype} {x.shape}".encode())
        found.update(np.ascontiguousarray(x))
    return found.hexdigest()


class Payer:
    """Makes updates one after another, and pays for each before any of it is seen.

    Args:
      ledger: that of process 0 decides for all processes.
      trainer: the compiled pieces; its own seed is not used.
      mechanism: of one update.
      seed: of the run and the experiment, from which the seeds of streams are derived.
      stream: the stream that sampling and noise are drawn from; it changes if a repetition fails.
    """

    def __init__(self, ledger: Ledger, trainer: Trainer, mechanism: Mechanism, seed: int, stream: str):
        self.ledger, self.mechanism, self.seed = ledger, mechanism, seed
        self._trainer = trainer
        self._draw_from(stream)

    def _draw_from(self, stream: str) -> None:
        self.stream = stream
        self._trainer, self._key = reseeded(self._trainer, derived_seed(self.seed, stream))

    def update(self, state: State) -> tuple[State, BatchMetrics | None, str]:
        """Makes one update and pays for it: (new state, metrics, ""), or (state, None, why it is refused)."""
        step = int(state.step)
        if refusal := self._refusal(step):
            return state, None, refusal
        while True:
            new, seen = one_update(self._trainer, state._replace(key=self._key))
            answer, refusal = self._charge(step, digest(new))
            if answer == PAID:
                return new, seen, ""
            del new, seen  # unseen
            if answer == REFUSED:
                return state, None, refusal
            self._draw_from(stream_name(self.stream, "not the same to the bit", digest(state)))

    def _refusal(self, step: int) -> str:
        """Says why the update need not even be made; "" if it is affordable, or may be a repetition."""

        def ask():
            if not self.ledger.may_repeat(step):
                try:
                    self.ledger.check_affordable(step, self.mechanism)
                except BudgetExceeded as error:
                    return str(error)
            return ""

        return call_on_process_0(ask)

    def _charge(self, step: int, released: str) -> tuple[str, str]:
        def pay():
            try:
                self.ledger.charge(step, self.mechanism, released, self.stream)
            except SharedNoise:
                return AFRESH, ""
            except BudgetExceeded as error:
                return REFUSED, str(error)
            return PAID, ""

        answer, refusal = call_on_process_0(pay)
        return answer, refusal
