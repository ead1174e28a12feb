"""Checkpoints (Orbax): the whole state of a run, so that a resumed run ends identical to the bit."""

import json
import pathlib
import secrets
from typing import Any

import jax
import orbax.checkpoint as ocp

from dpnb.files import write_whole


class Checkpoints:
    """The checkpoints of one run in `directory/checkpoints`, the newest two of them.

    Raises:
      ValueError: the directory holds the checkpoints of another experiment.
    """

    def __init__(self, directory: pathlib.Path, fingerprint: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)
        self.fingerprint, self.directory = fingerprint, directory

    def save(self, state: Any, notes: dict[str, Any]) -> None:
        """Writes atomically: a run killed while writing resumes from the checkpoint before.

        Args:
          state: a `dpnb.update.State`; its key is not written.
          notes: JSON values to find again beside it.
        """
        # The key is derived from the seed, and whoever has it has the noise: it stays out.
        state = state._replace(key=jax.numpy.zeros_like(state.key))
        extra = {"fingerprint": self.fingerprint, "notes": notes}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, on the devices as `like`, and its notes; else (like, {})."""
        step = self.manager.latest_step()
        if step is None:
            return like, {}
        extra = self.manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
        if extra["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.directory} must hold checkpoints of this very experiment, but it holds those of "
                "another one (other hyper-parameters, seed or data); choose another directory"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        state = self.manager.restore(step, args=args).state
        return state._replace(key=like.key), extra["notes"]

    def close(self) -> None:
        self.manager.close()


def run_seed(directory: pathlib.Path, seed: int | None) -> tuple[int, str]:
    """(seed, label): the given seed, or a secret one of 63 bits kept in `directory/seed.secret`.

    Whoever knows the seed knows the noise, so a secret one appears in no record. The label may:
    it tells runs of different seeds apart, so that a new secret is never taken for a replay.
    """
    if seed is not None:
        return seed, f"seed {seed}"
    file = directory / "seed.secret"
    if not file.exists():
        drawn = {"seed": secrets.randbits(63), "label": secrets.token_hex(8)}
        write_whole(file, json.dumps(drawn), mode=0o600)
    kept = json.loads(file.read_text())
    return kept["seed"], f"secret {kept['label']}"


def salt(directory: pathlib.Path, computation: str) -> str:
    """ "" for the hardware and code that began the run in `directory`, else what they are now.

    A step repeated after a crash is the same to the bit only where it began; elsewhere it is
    a new release, which is charged anew and needs noise of its own.  `directory/began_with` has a
    line for every change, so that going back to what was before is a change, too.
    """
    file, now = directory / "began_with", " ".join(computation.split())
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines or lines[-1] != now:
        lines.append(now)
        write_whole(file, "\n".join(lines) + "\n")
    return f" {len(lines)} {now}" if len(lines) > 1 else ""
