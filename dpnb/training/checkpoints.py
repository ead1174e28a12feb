"""Checkpoints (Orbax) of the whole state of a run, so that a resumed run ends identical to the bit."""

import hashlib
import json
import pathlib
import shutil
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp


def _sha256(extra: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(extra, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """Keeps the newest two checkpoints of one run in `directory/checkpoints`.

    Args:
      fingerprint: of the experiment, its data and its seed; `restore` refuses the checkpoints of another one.
    """

    def __init__(self, directory: pathlib.Path, fingerprint: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options)
        self.fingerprint, self.directory = fingerprint, directory

    def save(self, state: Any, notes: dict[str, Any]) -> None:
        """Writes a checkpoint atomically: a run killed while writing resumes from the one before.

        Args:
          state: a `dpnb.training.state.State`; its key is not written.
          notes: JSON values to restore with it.
        """
        # The key is derived from the seed and determines the augmentation, so it is not written.
        state = state._replace(key=jax.numpy.zeros_like(state.key))
        extra = {"fingerprint": self.fingerprint, "notes": notes}
        extra["sha256"] = _sha256(extra)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=args)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the newest readable state, on the devices of `like`, and its notes; else (like, {}).

        Newer ones that are damaged are set aside with a warning, and the updates since are repeated.

        Raises:
          ValueError: it is another experiment's, or there are checkpoints but none can be read.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                extra, state = self._read(step, like)
            except Exception as error:  # Orbax raises many kinds
                damaged, why = self.directory / "checkpoints" / str(step), error
                warnings.warn(
                    f"the checkpoint {damaged} must be whole, but cannot be read ({type(error).__name__}: "
                    f"{str(error)[:200]}); going on from an older one",
                    stacklevel=5,  # the caller of `dpnb.training.train`
                )
                continue
            if extra["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.directory} must hold checkpoints of this very experiment, but it holds those of "
                    "another one (other hyper-parameters, seed or data); choose another directory"
                )
            for newer in self.manager.all_steps():
                if newer > step:
                    self._set_aside(newer)
            return state._replace(key=like.key), extra["notes"]
        if self.manager.all_steps():
            raise ValueError(
                f"one of the checkpoints in {damaged.parent} must be readable, but none is ({why}); restore a copy "
                "of that folder, or delete it: the run then begins anew, and repeats what it paid for"
            )
        return like, {}

    def _read(self, step: int, like: Any) -> tuple[dict[str, Any], Any]:
        extra = self.manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
        said = extra.pop("sha256", None)  # None: of an earlier version
        if said not in (None, _sha256(extra)):
            raise ValueError("its notes are not those that were written")
        if extra["fingerprint"] != self.fingerprint:
            return extra, None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return extra, self.manager.restore(step, args=args).state

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint away, as another one will be written at this step."""
        folder = self.directory / "checkpoints"
        if jax.process_index() == 0:
            shutil.move(folder / str(step), self.directory / f"damaged-checkpoint-{step}")
        self.manager.reload()

    def close(self) -> None:
        """Releases Orbax's manager."""
        self.manager.close()
