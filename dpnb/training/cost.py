"""Predicts what a run will cost on this device before it starts."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpnb.data import Dataset
from dpnb.experiments import Experiment
from dpnb.training import choice
from dpnb.training.devices import memory_of, per_device_batch_size
from dpnb.training.update import draw_noise, make_trainer, masked_batch


@dataclasses.dataclass(frozen=True)
class Cost:
    """The predicted cost of a run.

    views, flops: of the whole run (forward and backward; one multiply-add counts as two).
    memory: bytes per device, XLA's figure for one physical batch with its arguments and results.
    seconds: of all updates on this device.
    physical_batch_size: examples per device.
    form: of the clipped gradient, and why.
    programs: the compiled sum of gradients, for `dpnb.training.train`; empty if the model shares none.
    chosen: how an accelerator computes, for `dpnb.training.train`, too; None on a CPU.
    """

    views: float
    flops: float
    memory: int
    seconds: float
    physical_batch_size: int
    form: str = ""
    programs: dict[tuple, Callable] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    chosen: choice.Choice | None = None

    def __str__(self) -> str:
        return (
            f"{self.views:.3g} views, {self.flops:.3g} FLOP, {self.memory / 2**20:.0f} MiB per device "
            f"(physical batches of {self.physical_batch_size} examples), about {duration(self.seconds)} of updates "
            f"(compilation, reading and evaluation come on top); {self.form}"
        )


def duration(seconds: float) -> str:
    """Formats a duration: "31 seconds", "4.2 minutes", "3.0 hours"."""
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def predict(
    experiment: Experiment,
    data: Dataset,
    repeats: int = 3,
    programs: dict[tuple, Callable] | None = None,
    directory: pathlib.Path | None = None,
) -> Cost:
    """Compiles one physical batch and one update, and times them on masked examples.

    No privacy is spent: every example is masked, and the result is thrown away. On an accelerator it is measured first how
    many examples go into a call (`dpnb.training.choice`).

    Args:
      experiment: calibrated, so that noise_multiplier and steps are known.
      data: as for training.
      repeats: number of timed calls after the compilation.
      directory: of the run that is predicted, whose choice is kept there on an accelerator.
      programs: see `dpnb.training.update.make_trainer`; by default an empty dict. They come with the result.
    """
    programs = {} if programs is None else programs
    chosen = None
    if choice.is_open(experiment, jax.devices()):
        if directory is None:
            chosen = choice.measure(experiment, data, jax.devices(), programs=programs)
        else:
            chosen = choice.settle(experiment, data, directory, jax.devices(), programs=programs)
        experiment = chosen.apply(experiment)
    trainer = make_trainer(experiment, data, seed=0, programs=programs)
    size, state = per_device_batch_size(experiment), trainer.state
    args = masked_batch(trainer, size)
    compiled = trainer.accumulate.lower(*args).compile()

    def timed(call):
        began = time.monotonic()
        result = jax.block_until_ready(call())
        return time.monotonic() - began, result

    batch_seconds, total = [], args[1]
    for _ in range(repeats + 1):  # the first call warms up
        seconds, total = timed(lambda t=total: compiled(args[0], t, *args[2:]))
        batch_seconds.append(seconds)
    trainer.update(state, trainer.zero(), draw_noise(trainer, 0))
    update_seconds, _ = timed(lambda: trainer.update(state, trainer.zero(), draw_noise(trainer, 0)))
    batches = -(-experiment.expected_batch_size // (size * trainer.mesh.devices.size))
    per_update = batches * min(batch_seconds[1:]) + update_seconds
    views = experiment.steps * experiment.expected_batch_size * max(experiment.augmult, 1)
    memory = memory_of(compiled)
    return Cost(
        views,
        views * flops_per_view(trainer.apply, trainer.state.params, data.shape),
        memory,
        experiment.steps * per_update,
        size,
        trainer.form,
        programs,
        chosen,
    )


def flops_per_view(apply: Callable, params: Any, shape: tuple[int, ...]) -> float:
    """Returns XLA's FLOP count of one image, forward and backward, unoptimised; NaN if unavailable.

    Args:
      apply: `(params, images) -> logits`.
      params: pytree of arrays or of their shapes.
      shape: of one image, as the network reads it.
    """

    def loss(params, image):
        return jnp.square(apply(params, image)).sum()

    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    analysis = jax.jit(jax.grad(loss)).lower(params, image).cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))
