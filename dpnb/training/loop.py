"""The training loop: one private run, from images to averaged parameters and a ledger.

    sample -> augment -> per-example gradient -> mean over views -> clip -> sum -> all-reduce
    -> noise -> / expected batch -> optimizer -> EMA -> CHARGE the ledger -> show, evaluate, save

The arrows up to EMA are `dpnb.training.update.one_update`. Before an update is made, the ledger is asked
whether the budget allows it; then the ledger is charged with the hash of its result, before any of that is
seen, shown, saved or evaluated (`dpnb.training.replay.Payer`). What precedes the first update is
`dpnb.training.session.prepare`.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from dpnb.data import Dataset
from dpnb.experiments import Experiment
from dpnb.training.choice import Choice
from dpnb.training.curve import accuracies, curve_point
from dpnb.training.evaluation import Evaluation
from dpnb.training.hosts import broadcast_from_process_0, call_on_process_0
from dpnb.training.pace import STOPPED, Pace
from dpnb.training.progress import Progress
from dpnb.training.session import Session, prepare
from dpnb.training.settings import hardware
from dpnb.training.sharding import fetch_replicated


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a training run.

    params, ema_params: the last and the averaged parameters, nested dicts of float32 arrays.
    history: one dict per point of the curve; its training loss, accuracy, norms and clipped
      fractions are not private.
    raw, ema: evaluations of the last and the averaged parameters.
    events: the ledger, run-length coded, as `dpnb.privacy` reads it.
    steps: number of updates made.
    seconds: wall time of training, evaluation and compilation included, summed over the processes that
      continued the run one after another.
    devices, computed_in: what made the updates, in words, and the dtype of the network; several, if the run was
      continued elsewhere.
    evaluated_in: the dtype of the network that was evaluated.
    choices: how accelerators computed, and what was measured for it, see `dpnb.training.choice`.
    """

    experiment: Experiment
    params: Any
    ema_params: Any
    history: list[dict[str, Any]]
    raw: Evaluation
    ema: Evaluation
    events: list[dict[str, Any]]
    steps: int
    seconds: float
    devices: str
    computed_in: str
    evaluated_in: str
    public: dict[str, str] | None  # the weights that it started from, see `dpnb.models.weights.provenance`
    choices: list[dict[str, Any]]
    stopped: str  # why the run ended before its last step; "" if it did not


def train(
    experiment: Experiment,
    data: Dataset,
    directory: str | pathlib.Path,
    *,
    model: nnx.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    devices: list[jax.Device] | None = None,
    checkpoint_every: float = 300.0,
    stop_at_step: int | None = None,
    allowed_steps: int | None = None,
    programs: dict[tuple, Callable] | None = None,
    chosen: Choice | None = None,
    deadline: float | None = None,
) -> Run:
    """Trains with DP-SGD, or continues where a killed run in `directory` stopped.

    Formal guarantee: with sampler "poisson" the sequence of parameters is
    (epsilon, delta)-differentially private under adding or removing one training image, against
    anyone who does not know the seed; `privacy.privacy_statement` says what this leaves out.
    Every step is in the ledger before any of its result is seen, and a step that would overspend
    the budget is not taken. Nothing is charged before an update has been compiled and made.

    Args:
      experiment: calibrated here if necessary.
      data: images, labels, and the split to report on.
      directory: of this run alone. Ledger, checkpoints and seed are in `directory/private` if the seed is
        secret (`dpnb.files.private_folder`).
      model, optimizer, devices: see `dpnb.training.update.make_trainer`.
      checkpoint_every: seconds between checkpoints; the curve's points are saved too.
      stop_at_step: stop early on purpose, with a checkpoint, to continue later.
      allowed_steps: how many updates fit the budget, from `privacy.calibrate_steps`; needed only
        if dp-accounting is not installed (noise_multiplier, steps and epsilon all given).
      programs: what `dpnb.training.cost.predict` or runs before compiled, see
        `dpnb.training.update.make_trainer`; it is checked like any other before anything is charged.
      chosen: how an accelerator computes, if that was measured before (`dpnb.training.choice`); by default it is
        measured when the run begins, and kept in `directory`.
      deadline: when to have ended, on `time.monotonic`: the run stops with a checkpoint before an update that would take
        longer, and another call goes on. It makes at least one update.
    Raises:
      ValueError: bad hyper-parameters, or the directory holds another experiment's run.
      KeyError, OSError: the public weights are not available.
      MixesExamples: the model lets one example influence another.
      DrawsRandomNumbers: it draws random numbers, as dropout does.
      UnsoundTrainer: clipping, noise or sampling do not behave as the guarantee needs them to.
      LedgerError: the ledger is locked or damaged, or does not hold the last update of the checkpoint.
    """
    terms = dict(
        model=model,
        optimizer=optimizer,
        devices=devices,
        allowed_steps=allowed_steps,
        programs=programs,
        chosen=chosen,
    )
    with prepare(experiment, data, directory, **terms) as session:
        experiment, stopped, saved = session.experiment, "", time.monotonic()
        pace = Pace(deadline, session.time_to_end() if deadline else 0.0)
        with Progress(experiment.steps, session.start) as progress, session.kept():
            for step in range(session.start, experiment.steps):
                if stop_at_step is not None and step >= stop_at_step:
                    stopped = f"stopped on purpose after {step} of {experiment.steps} updates"
                    break
                if pace.is_over():
                    stopped = f"{STOPPED} after {step} of {experiment.steps} updates; it goes on from there"
                    break
                new, seen, stopped = session.update_and_charge()  # unseen until it is paid for
                if stopped:
                    break
                point = curve_point(step + 1, seen, session.epsilon(step + 1))
                last = step + 1 == experiment.steps
                shown = last or (experiment.eval_every and (step + 1) % experiment.eval_every == 0)
                if shown:
                    point |= accuracies(session.evaluate(new, experiment.eval_examples))
                # Both at once, so that an interrupted run keeps both or neither.
                history = [*session.history, point] if shown else session.history
                session.state, session.history = new, history
                if last or broadcast_from_process_0(int(time.monotonic() - saved > checkpoint_every)):
                    session.save()
                    saved = time.monotonic()
                progress.show(point)
        events = call_on_process_0(session.ledger.events)
    return _finish(session, stopped, events)


def _finish(session: Session, stopped: str, events: list[dict[str, Any]]) -> Run:
    """Returns the result of the run, evaluated on all images."""
    state = session.state
    evaluated = session.evaluate(state, len(session.data.test))
    went_on = int(state.step) > session.start
    return Run(
        experiment=session.experiment,
        params=jax.tree.map(fetch_replicated, state.params),
        ema_params=jax.tree.map(fetch_replicated, state.ema),
        history=session.history,
        raw=evaluated["raw"],
        ema=evaluated["ema"],
        events=events,
        steps=int(state.step),
        seconds=session.seconds + (time.monotonic() - session.began if went_on else 0.0),
        devices=", then ".join(session.hardware) or hardware(session.devices),
        computed_in=", then ".join(session.computed_in) or session.compute_dtype,
        evaluated_in=session.compute_dtype,
        public=session.public,
        choices=session.choices,
        stopped=stopped,
    )
