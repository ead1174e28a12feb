"""Ends a run in time, with a checkpoint, so that another sitting goes on."""

import math
import time

from dpnb.training.hosts import broadcast_from_process_0

MARGIN = 5.0  # seconds
STOPPED = "stopped in time"  # how `Run.stopped` begins then


def goes_on(stopped: str) -> bool:
    """Returns whether the same call goes on with a run, by its `Run.stopped`: it was stopped in time."""
    return stopped.startswith(STOPPED)


def deadline(minutes: float | None) -> float | None:
    """Returns when so many minutes from now are over, on `time.monotonic`; None for None.

    Raises:
      ValueError: it is not a positive number.
    """
    if minutes is None:
        return None
    if not isinstance(minutes, (int, float)) or not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be a positive number, got {minutes!r}")
    return time.monotonic() + 60 * minutes


class Pace:
    """Watches how long updates take, and says when no other one fits.

    A run makes at least one update a sitting, so that it gets on whatever its deadline is.

    Args:
      deadline: when the run must have ended, on `time.monotonic`; None for never.
      ending: seconds that the last checkpoint and evaluation take.
    """

    def __init__(self, deadline: float | None, ending: float = 0.0):
        self.deadline, self.ending = deadline, ending
        self.first, self.longest, self.updates, self.last = 0.0, 0.0, -1, time.monotonic()

    def is_over(self) -> bool:
        """Returns, on every process, whether the next update would end too late; to be called before each.

        All that happens between two calls counts as one update. The first one, most of which is compilation, counts as
        long as there is no other.
        """
        if self.deadline is None:
            return False
        now, self.updates = time.monotonic(), self.updates + 1
        if self.updates == 1:
            self.first = now - self.last
        elif self.updates:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        late = now + (self.longest or self.first) + self.ending + MARGIN > self.deadline
        return bool(broadcast_from_process_0(int(late))) and self.updates > 0
