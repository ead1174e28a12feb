"""Shows progress: a bar in a terminal or notebook, plain lines in batch jobs."""

import os
import sys
import time
from typing import Any


def interactive() -> bool:
    """Returns whether a person is watching: not under papermill or nbconvert, nor into a pipe.

    The environment variable DPNB_PROGRESS overrides it: "bar" means yes, any other value no.
    """
    choice = os.environ.get("DPNB_PROGRESS")  # "bar" or "plain"
    if choice:
        return choice == "bar"
    if "ipykernel" not in sys.modules:
        return sys.stderr.isatty()
    if "google.colab" in sys.modules:
        return True
    try:
        import psutil  # ipykernel needs it too

        parent = " ".join(psutil.Process(os.getppid()).cmdline())
    except Exception:
        return False
    return "jupyter" in parent and not any(batch in parent for batch in ("papermill", "nbconvert", "execute"))


class Progress:
    """Counts updates from `start` to `total`, and shows numbers beside them.

    In a batch job it prints a line for every twentieth of the run, but no more than one in a second, and whenever
    more than `seconds` have passed since the last. Speed and time left leave out the first update of this
    process, most of which is compilation.
    """

    def __init__(self, total: int, start: int = 0, seconds: float = 60.0):
        self.total, self.done, self.start = total, start, start
        self.seconds, self.printed = seconds, time.monotonic()
        self.compiled = None  # when the first update was done
        self.examples, self.accuracies, self.bar = 0, {}, None
        if interactive():
            from tqdm.auto import tqdm

            # smoothing=0: speed and time left are of all updates since `initial`.
            self.bar = tqdm(total=total, initial=start, unit="update", dynamic_ncols=True, smoothing=0)

    def show(self, point: dict[str, Any]) -> None:
        """Counts one more update, and shows its `point` of the training curve."""
        self.done += 1
        now = time.monotonic()
        first, timed = self.compiled is None, self.done - self.start - 1
        if first:
            self.compiled = now
        else:
            self.examples += point["batch_size"]
        elapsed = max(now - self.compiled, 1e-9)
        for name in ("raw_accuracy", "ema_accuracy"):  # the last known ones stay on show
            if name in point:
                self.accuracies[name.replace("_accuracy", "")] = f"{point[name]:.1f}%"
        shown = {
            "loss": f"{point['train_loss']:.3f}",
            "train": f"{point['train_accuracy']:.1f}%",
            **self.accuracies,
            "epsilon at most": f"{point['epsilon']:.3g}",
            "examples/s": "-" if first else f"{self.examples / elapsed:.0f}",
        }
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(f"{k} {v}" for k, v in shown.items()), refresh=False)
            if first:
                self.bar.initial = self.bar.n + 1
                self.bar.start_t = self.bar.last_print_t = self.bar._time()
            self.bar.update()
            if first:
                self.bar.refresh()
            return
        every = -(-self.total // 20)
        due = self.seconds if self.done % every else 1.0
        if now - self.printed >= due or self.done == self.total:
            self.printed = now
            left = "-" if first else f"{elapsed / timed * (self.total - self.done) / 60:.1f} min"
            numbers = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"update {self.done}/{self.total}  {numbers}  time left {left}", flush=True)

    def close(self) -> None:
        """Closes the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
