"""Prepares a run for its first update: checks, seed, fingerprints, ledger, checkpoint, compiled pieces.

Everything that can be refused is refused here. Nothing is charged, and no files are written but a secret seed,
the lock of the ledger, and on an accelerator what was chosen there; damaged checkpoints are set aside.
"""

import contextlib
import dataclasses
import decimal
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dpnb import privacy
from dpnb.data import Dataset
from dpnb.experiments import Experiment
from dpnb.files import private_folder
from dpnb.models import check_deterministic, check_independent, weights
from dpnb.models.precision import resolved
from dpnb.models.registry import make_model
from dpnb.privacy import Ledger, derived_seed
from dpnb.training import choice, features
from dpnb.training.checkpoints import Checkpoints
from dpnb.training.checks import check_trainer
from dpnb.training.curve import epsilon_spent
from dpnb.training.evaluation import Evaluation, even_batch_size, make_evaluate
from dpnb.training.hosts import call_on_all, call_on_process_0, check_shared
from dpnb.training.identity import computation
from dpnb.training.preconditions import (
    check_data,
    check_noise,
    check_outputs,
    check_own_model,
    check_size,
    noise_images,
)
from dpnb.training.replay import Payer, digest
from dpnb.training.seeds import assert_same_seed, initial_rngs, run_seed, stream_name
from dpnb.training.settings import hardware, settings_of
from dpnb.training.sharding import fetch_replicated
from dpnb.training.state import State
from dpnb.training.update import Trainer, make_trainer

REMEDY = "the run ends with those before it: lower the learning rate"


@dataclasses.dataclass
class Session:
    """A run that is ready to continue from `state`; made by `prepare`, driven by `dpnb.training.loop.train`.

    payer: makes updates, and charges the ledger for each before any of it is seen.
    compute_dtype: of the network here, see `dpnb.models.precision`.
    settings: hash of what decides how the program rounds, see `dpnb.training.settings`.
    history: points of the curve so far.
    public: the weights that it started from, see `dpnb.models.weights.provenance`.
    choice: how an accelerator computes, and what was measured for it; None where there was nothing to choose.
    seconds: wall time that earlier processes took.
    hardware, computed_in, choices: what made the updates so far, in which dtype, and with which choice, one after
      another, each once (`dpnb.training.settings.hardware`, `compute_dtype`, `choice`).
    evaluated: (step, images) of the last evaluation, and what was found.
    """

    experiment: Experiment
    data: Dataset
    devices: list[jax.Device]
    ledger: Ledger
    payer: Payer
    checkpoints: Checkpoints
    settings: str
    compute_dtype: str
    state: State
    history: list[dict[str, Any]]
    public: dict[str, str] | None
    choice: choice.Choice | None
    seconds: float
    hardware: list[str]
    computed_in: list[str]
    choices: list[dict[str, Any]]
    began: float  # when this process began, on `time.monotonic`
    evaluate_split: Callable[[Any, Any], Evaluation]  # (params, split)
    is_finite: Callable[[Any], bool]  # (params): their outputs for public inputs
    budget_spent: Callable[[int], float]  # (charges) -> epsilon
    evaluated: tuple[tuple[int, int], dict[str, Evaluation]] | None = None

    def __post_init__(self):
        self.start = int(self.state.step)

    def update_and_charge(self) -> tuple[State, Any, str]:
        """Makes one update and pays for it: (new state, metrics, "").

        The last item says why the run ends here, if it does: the update was refused (then the state is the
        old one and the metrics are None), or its outputs are not finite, and the caller drops the new state.
        """
        new, seen, stopped = self.payer.update(self.state)
        here = [(self.hardware, hardware(self.devices)), (self.computed_in, self.compute_dtype)]
        here += [(self.choices, self.choice.as_dict())] if self.choice else []
        for said, now in here if not stopped else ():
            if now not in said:
                said.append(now)
        if not stopped and not self.is_finite(new.params):
            stopped = f"update {int(new.step)} left parameters whose outputs are not finite; {REMEDY}"
        return new, seen, stopped

    def epsilon(self, step: int) -> float:
        """Returns an upper bound on epsilon after `step` updates; those charged twice count twice."""
        return self.budget_spent(step + call_on_process_0(lambda: self.ledger.extra))

    def evaluate(self, state: State, images: int) -> dict[str, Evaluation]:
        """Evaluates "raw" and "ema", the parameters and their averages, on the first `images` of the split.

        What was found last is kept: the end of the curve and of the run often ask for the same.
        """
        asked = int(state.step), min(images, len(self.data.test))
        if self.evaluated is None or self.evaluated[0] != asked:
            split = self.data.test.head(images)
            both = {"raw": state.params, "ema": state.ema}
            found = {name: self.evaluate_split(params, split) for name, params in both.items()}
            self.evaluated = asked, found
        return self.evaluated[1]

    def time_to_end(self) -> float:
        """Returns about how many seconds the evaluation at the end of the run takes."""
        size, began = even_batch_size(len(self.data.test)), time.monotonic()
        self.evaluate_split(self.state.params, self.data.test.head(size))
        return 2 * -(-len(self.data.test) // size) * (time.monotonic() - began)

    def save(self) -> None:
        """Writes a checkpoint, except at update 0, where there is nothing to keep."""
        if int(self.state.step):
            notes = {"history": self.history, "stream": self.payer.stream, "settings": self.settings}
            notes |= {"hardware": self.hardware, "computed_in": self.computed_in, "choices": self.choices}
            notes["seconds"] = self.seconds + time.monotonic() - self.began
            self.checkpoints.save(self.state, notes)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Writes a checkpoint when the block ends, after an error too, so that nothing that was paid for is lost.

        After an error of one among several processes there is none, as it would wait for the others: the updates since the
        last one are repeated, to the bit.
        """
        try:
            yield
        except BaseException:
            if jax.process_count() == 1:
                self.save()
            raise
        self.save()


@contextlib.contextmanager
def prepare(
    experiment: Experiment,
    data: Dataset,
    directory: str | pathlib.Path,
    *,
    model: nnx.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    devices: list[jax.Device] | None = None,
    allowed_steps: int | None = None,
    programs: dict[tuple, Callable] | None = None,
    chosen: choice.Choice | None = None,
) -> Iterator[Session]:
    """Checks everything, opens ledger and checkpoints, and compiles; the ledger is locked within the block.

    Arguments and errors are those of `dpnb.training.train`.
    """
    began = time.monotonic()
    experiment = call_on_all(lambda: checked(experiment, data, model))
    folder = private_folder(directory, experiment.seed is None)
    check_shared(folder)
    mechanism = experiment.mechanism(len(data.train))
    journal = folder / "ledger.jsonl" if jax.process_index() == 0 else None
    budget = privacy.PrivacyBudget(experiment.epsilon, experiment.delta)
    allowed = {mechanism: allowed_steps} if allowed_steps else None
    devices = jax.devices() if devices is None else devices
    programs = {} if programs is None else programs
    chosen = choice.settle(experiment, data, folder, devices, chosen, model=model, programs=programs)
    ran = chosen.apply(experiment) if chosen else experiment
    settings = settings_of(ran, data, devices)
    # The ledger is locked from here on, and nothing is written to it. Those of other processes are not used.
    with open_ledger(
        journal, budget, experiment.accountant, allowed_steps=allowed, settings=settings
    ) as ledger:
        public = weights.provenance(experiment.pretrained, data)
        fingerprint, seed, label = _identify(experiment, data, folder, model, optimizer, public)
        if model is None:
            rngs = initial_rngs(derived_seed(seed, "initial parameters"))
            model = make_model(resolved(experiment, devices[0]), len(data.classes), rngs)
            check_outputs(model, data)
        if weights.provenance(experiment.pretrained) != public:
            raise ValueError(f"{experiment.pretrained} changed while it was read; start again")
        check_deterministic(model, noise_images(data))
        check_independent(model, noise_images(data))
        own = dict(model=model, optimizer=optimizer, devices=devices)
        trainer = make_trainer(ran, data, seed=seed, **own, programs=programs)
        report = check_trainer(trainer)
        report.raise_if_failed()
        if report.rounding:
            warnings.warn(
                f"what an example adds depends on its place in the batch, by up to {report.rounding:.1g} clip norms: "
                "this processor rounds so, and epsilon leaves it out (docs/exact_noise.md)",
                stacklevel=4,  # the caller of `dpnb.training.train`
            )
        checkpoints = Checkpoints(folder, f"{fingerprint} {label}")
        state, notes = checkpoints.restore(trainer.state)
        stream = _stream(ledger, state, notes, settings)
        assert_same_seed(derived_seed(seed, stream))
        evaluate = make_evaluate(trainer.apply, even_batch_size(len(data.test)), data.recipe)
        evaluate(state.params, data.test.head(1))  # compiles, before anything is charged
        session = Session(
            experiment=experiment,
            data=data,
            devices=devices,
            ledger=ledger,
            payer=Payer(ledger, trainer, mechanism, seed, stream),
            checkpoints=checkpoints,
            settings=settings,
            compute_dtype=trainer.compute_dtype,
            state=state,
            history=notes.get("history", []),
            public=public,
            choice=chosen,
            seconds=notes.get("seconds", 0.0),
            hardware=notes.get("hardware", []),
            computed_in=notes.get("computed_in", []),
            choices=notes.get("choices", []),
            began=began,
            evaluate_split=evaluate,
            is_finite=make_is_finite(trainer, data),
            budget_spent=epsilon_spent(mechanism, experiment),
        )
        del state  # a generator keeps its locals alive, and the session's state changes with every update
        try:
            yield session
        finally:
            checkpoints.close()


def checked(experiment: Experiment, data: Dataset, model: nnx.Module | None = None) -> Experiment:
    """Returns the calibrated experiment, after the checks that need nothing but it, the data and a model of one's own."""
    check_data(experiment, data)
    experiment = calibrate(experiment, len(data.train))
    check_noise(experiment)
    check_size(experiment, data)
    if model is None:
        features.check(experiment, data)
    else:
        check_own_model(experiment)
        check_outputs(model, data)
    return experiment


def _identify(experiment, data, folder, model, optimizer, public) -> tuple[str, int, str]:
    """Returns (fingerprint of the release, its seed, label of the seed), the same on every process."""
    custom = computation(model, optimizer, data.shape)
    origin = {"public": public["sha256"]} if public else {}
    fingerprint = experiment.fingerprint(data=data.fingerprint, custom=custom, **origin)
    # Process 0 first: it may have to write what the others read.
    call_on_process_0(lambda: run_seed(folder, experiment.seed)[1])
    seed, label = run_seed(folder, experiment.seed)
    # Two releases must not share their noise, unless they are the same to the bit.
    seed = derived_seed(seed, fingerprint)
    assert_same_seed(seed)
    return fingerprint, seed, label


def _stream(ledger: Ledger, state: State, notes: dict[str, Any], settings: str) -> str:
    """Returns the stream to continue in: that of the checkpoint, or a new one under other settings.

    Raises:
      LedgerError: the ledger does not hold the checkpoint's last update.
    """
    here = digest(state)
    if start := int(state.step):  # a checkpoint whose ledger was deleted is not continued
        call_on_process_0(lambda: ledger.check_holds(start - 1, here))
    stream = notes.get("stream", stream_name(""))
    if call_on_process_0(lambda: notes.get("settings", ledger.settings) != settings):
        stream = stream_name(stream, settings, here)
    return stream


def calibrate(experiment: Experiment, n: int) -> Experiment:
    """Fills in the one field among (noise_multiplier, steps, epsilon) that is None.

    If all three are given they are kept, and the ledger ends the run when the budget is spent. Noise and epsilon are
    rounded up to 9 digits: the last ones differ between versions and processors, and a run has to be the same
    experiment on another machine, where it goes on.

    Args:
      experiment: what is to be trained.
      n: number of training examples; q = expected_batch_size / n.
    Raises:
      ValueError: expected_batch_size > n, or nothing fits the budget.
    """
    e, q = experiment, experiment.expected_batch_size / n
    if q > 1:
        raise ValueError(
            f"{e.name}: expected_batch_size must be at most the {n} training examples, "
            f"got {e.expected_batch_size}; set a smaller one"
        )
    if not math.isinf(e.epsilon or 0):
        privacy.warn_if_delta_is_large(e.delta, n)
    if e.epsilon is None:
        spent = privacy.epsilon(e.mechanism(n), e.steps, delta=e.delta, accountant=e.accountant)
        return e.replace(epsilon=_rounded_up(spent))
    budget = privacy.PrivacyBudget(e.epsilon, e.delta)
    if e.steps is None:
        return e.replace(steps=privacy.calibrate_steps(budget, q, e.noise_multiplier, e.accountant))
    if e.noise_multiplier is None:
        if math.isinf(e.epsilon):
            return e.replace(noise_multiplier=0.0)
        return e.replace(
            noise_multiplier=_rounded_up(privacy.calibrate_noise(budget, q, e.steps, e.accountant))
        )
    return e


def _rounded_up(x: float, digits: int = 9) -> float:
    """Returns x, or the next number with so many significant digits."""
    if not math.isfinite(x) or x <= 0:
        return x
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return float(context.create_decimal(decimal.Decimal(x)))


def open_ledger(journal: pathlib.Path | None, *terms, **more) -> Ledger:
    """Opens the run's ledger on process 0 and an empty one in memory elsewhere; errors are raised on all."""
    opened = []
    call_on_process_0(lambda: opened.append(Ledger(journal, *terms, **more)))
    return opened[0] if opened else Ledger(None, *terms, **more)


def make_is_finite(trainer: Trainer, data: Dataset) -> Callable[[Any], bool]:
    """Returns a function that says whether parameters give finite outputs for random images.

    It reads nothing but these and released parameters, so ending a run by it costs no privacy.
    """
    inputs = noise_images(data)
    finite = jax.jit(lambda params: jnp.isfinite(trainer.apply(params, inputs)).all())
    return lambda params: bool(fetch_replicated(finite(params)))
