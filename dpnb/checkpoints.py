"""Checkpoints (Orbax): the whole state of a run, so that a resumed run ends identical to the bit."""

import json
import pathlib
import secrets
from typing import Any

import jax
import orbax.checkpoint as ocp

History = list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run in `directory/checkpoints`, the newest two of them.

    Raises:
      ValueError: the directory holds the checkpoints of another experiment.
    """

    def __init__(self, directory: pathlib.Path, fingerprint: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)
        self.fingerprint, self.directory = fingerprint, directory

    def save(self, state: Any, history: History, events: list[dict]) -> None:
        """Writes atomically: a run killed while writing resumes from the checkpoint before."""
        extra = {"fingerprint": self.fingerprint, "history": history, "events": events}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, History, list[dict]]:
        """The newest state, on the devices as `like`, its history and ledger; else (like, [], [])."""
        step = self.manager.latest_step()
        if step is None:
            return like, [], []
        extra = self.manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
        if extra["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.directory} must hold checkpoints of this very experiment, but it holds those of "
                "another one (other hyper-parameters, seed or data); choose another directory"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=args).state, extra["history"], extra["events"]

    def close(self) -> None:
        self.manager.close()


def run_seed(directory: pathlib.Path, seed: int | None) -> int:
    """The given seed, or a secret one of 63 bits kept in `directory/seed.secret` for resuming.

    Whoever knows the seed knows the noise, so a secret one appears in no record.
    """
    if seed is not None:
        return seed
    file = directory / "seed.secret"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(json.dumps(secrets.randbits(63)))
    return json.loads(file.read_text())
