"""Ends a run in time, with a checkpoint, so that another sitting goes on."""

import time

from dpnb.training.hosts import broadcast_from_process_0

MARGIN = 5.0  # seconds


class Pace:
    """Watches how long updates take, and says when no other one fits.

    A run makes at least one update a sitting, so that it gets on whatever its deadline is.

    Args:
      deadline: when the run must have ended, on `time.monotonic`; None for never.
      ending: seconds that the last checkpoint and evaluation take.
    """

    def __init__(self, deadline: float | None, ending: float = 0.0):
        self.deadline, self.ending = deadline, ending
        self.longest, self.updates, self.last = 0.0, -1, time.monotonic()

    def is_over(self) -> bool:
        """Returns, on every process, whether the next update would end too late; to be called before each.

        All that happens between two calls counts as one update. The first one, most of which is compilation, does not.
        """
        if self.deadline is None:
            return False
        now, self.updates = time.monotonic(), self.updates + 1
        if self.updates > 1:
            self.longest = max(self.longest, now - self.last)
        self.last = now
        late = now + self.longest + self.ending + MARGIN > self.deadline
        return bool(broadcast_from_process_0(int(late))) and self.updates > 0
