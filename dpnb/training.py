"""The loop: one private training run, from images to averaged parameters and a ledger.

raw -> sample -> augment -> per-example gradient -> mean over views -> clip -> sum
-> all-reduce -> noise -> / expected batch -> optimizer -> EMA | ledger | shown, evaluated, saved
(the arrows from `sample` to `EMA` are `dpnb.update.one_update`; the ledger is asked before, and is paid
before anything of the result is seen: `dpnb.replay.Payer`)
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from flax import nnx

from dpnb import features, privacy
from dpnb.checkpoints import Checkpoints, run_seed
from dpnb.checks import check_trainer
from dpnb.data import Dataset
from dpnb.data.photographs import Photographs
from dpnb.evaluation import Evaluation, make_evaluate
from dpnb.experiments.experiment import Experiment
from dpnb.files import private_folder
from dpnb.hosts import any_process, by_first, from_first
from dpnb.identity import code, computation
from dpnb.models import weights
from dpnb.models.checks import check_independent
from dpnb.privacy.ledger import Ledger
from dpnb.privacy.randomness import derived_seed
from dpnb.progress import Progress
from dpnb.replay import Payer, digest, stream_name
from dpnb.sharding import gathered
from dpnb.update import (
    Seen,
    Trainer,
    call_size,
    check_noise,
    initial_rngs,
    make_model,
    make_trainer,
    memory_limit,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run leaves.

    history: one dict per point of the curve; its training loss, accuracy, norms and clipped
      fractions are not private.
    raw, ema: evaluations of the final parameters, last iterate and averaged.
    events: the ledger, run-length coded, as `dpnb.privacy` reads it.
    seconds: wall time of training, evaluation and compilation included, over all processes that
    took part one after another.
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
    public: dict[str, str] | None  # the weights that it began with, see `dpnb.models.weights.provenance`
    stopped: str  # why the run ended before its last step; "" if it did not


def calibrated(experiment: Experiment, n: int) -> Experiment:
    """Fills in the one field among (noise_multiplier, steps, epsilon) that is None.

    Where all three are given they are kept, and the ledger ends the run when the budget is spent.

    Args:
      experiment: what is to be trained.
      n: number of training examples; q = expected_batch_size / n.
    Raises:
      ValueError: B > n, or nothing that fits the budget.
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
        return e.replace(
            epsilon=privacy.epsilon(e.mechanism(n), e.steps, delta=e.delta, accountant=e.accountant)
        )
    budget = privacy.PrivacyBudget(e.epsilon, e.delta)
    if e.steps is None:
        return e.replace(steps=privacy.calibrate_steps(budget, q, e.noise_multiplier, e.accountant))
    if e.noise_multiplier is None:
        if math.isinf(e.epsilon):
            return e.replace(noise_multiplier=0.0)
        return e.replace(noise_multiplier=privacy.calibrate_noise(budget, q, e.steps, e.accountant))
    return e


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
) -> Run:
    """Trains with DP-SGD, or goes on where a killed run in `directory` stopped.

    Formal guarantee: with sampler "poisson" the sequence of parameters is
    (epsilon, delta)-differentially private under adding or removing one training image, for
    whoever does not know the seed; `privacy.privacy_statement` says what this leaves out.
    Every step is in the ledger before anything of its result is seen, and a step that would overspend
    the budget is not taken. Nothing is charged before an update has been compiled and made.

    Args:
      experiment: calibrated here where needed.
      data: images, labels, and the split to report on.
      directory: of the run; one each. Ledger, checkpoints and seed lie in `directory/private` where the
        seed is secret (`dpnb.files.private_folder`).
      model, optimizer, devices: see `dpnb.update.make_trainer`.
      checkpoint_every: seconds between checkpoints; the curve's points are saved too.
      stop_at_step: stop early on purpose, after a checkpoint, to go on later.
      allowed_steps: how many updates fit the budget, from `privacy.calibrate_steps`; needed only
        where dp-accounting is not installed (noise_multiplier, steps and epsilon all given).
    Raises:
      ValueError: bad hyper-parameters, or the directory holds another experiment's run.
      MixesExamples: the model lets one example influence another.
      UnsoundTrainer: clipping, noise or sampling do not behave as the guarantee needs them to.
    """
    began = time.monotonic()
    experiment = calibrated(experiment, len(data.train))
    check_noise(experiment)
    check_size(experiment, data)
    if model is None:
        features.check(experiment, data)
    else:
        check_own_model(experiment)
    folder = private_folder(directory, experiment.seed is None)
    mechanism = experiment.mechanism(len(data.train))
    journal = folder / "ledger.jsonl" if jax.process_index() == 0 else None
    budget = privacy.PrivacyBudget(experiment.epsilon, experiment.delta)
    allowed = {mechanism: allowed_steps} if allowed_steps else None
    used = jax.devices() if devices is None else devices
    terms = dict(allowed_steps=allowed, settings=settings_of(experiment, data, used))
    # Locked from here on, and nothing is written yet. The other processes' ledgers are never asked.
    with open_ledger(journal, budget, experiment.accountant, **terms) as ledger:
        custom = computation(model, optimizer, data.shape)
        public = weights.provenance(experiment.pretrained, data)
        origin = {"public": public["sha256"]} if public else {}
        fingerprint = experiment.fingerprint(data=data.fingerprint, custom=custom, **origin)
        by_first(lambda: run_seed(folder, experiment.seed)[1])  # which may have to write what the others read
        seed, label = run_seed(folder, experiment.seed)
        # Two releases must not share their noise, unless they are the same to the bit.
        seed = derived_seed(seed, fingerprint)
        agree(seed)
        if model is None:
            model = make_model(
                experiment, len(data.classes), initial_rngs(derived_seed(seed, "initial parameters"))
            )
        if weights.provenance(experiment.pretrained) != public:
            raise ValueError(f"{experiment.pretrained} changed while it was read; start again")
        check_independent(model, noise_images(data))
        check_outputs(model, data)
        trainer = make_trainer(experiment, data, seed=seed, model=model, optimizer=optimizer, devices=devices)
        check_trainer(trainer).raise_if_failed()
        checkpoints = Checkpoints(folder, f"{fingerprint} {label}")
        state, notes = checkpoints.restore(trainer.state)
        start, history = int(state.step), notes.get("history", [])
        here = digest(state)
        if start:  # a checkpoint whose ledger was deleted is not continued
            by_first(lambda: ledger.check_holds(start - 1, here))
        stream, settings = notes.get("stream", stream_name("")), terms["settings"]
        if by_first(lambda: notes.get("settings", ledger.settings) != settings):
            stream = stream_name(stream, settings, here)
        agree(derived_seed(seed, stream))
        payer = Payer(ledger, trainer, mechanism, seed, stream)
        evaluate, alive = make_evaluate(trainer.apply, recipe=data.recipe), make_alive(trainer, data)
        evaluate(state.params, data.test.head(1))  # compiles, before anything is charged
        before, stopped, saved = notes.get("seconds", 0.0) - began, "", time.monotonic()
        spent = epsilon_spent(mechanism, experiment)

        def save():
            if int(state.step) == 0:  # nothing was charged: the next start is as the first one
                return
            notes = {"history": history, "stream": payer.stream, "settings": settings}
            notes["seconds"] = before + time.monotonic()
            checkpoints.save(state, notes)

        with Progress(experiment.steps, start) as progress:
            try:
                for step in range(start, experiment.steps):
                    if stop_at_step is not None and step >= stop_at_step:
                        stopped = f"stopped on purpose after {step} of {experiment.steps} updates"
                        break
                    new, seen, stopped = payer.update(state)
                    if not stopped and not alive(new.params):
                        stopped = f"update {step + 1} left parameters whose outputs are not finite; {REMEDY}"
                    if stopped:
                        break
                    point = curve_point(step + 1, seen, spent(step + 1 + by_first(lambda: ledger.extra)))
                    last = step + 1 == experiment.steps
                    shown = last or (experiment.eval_every and (step + 1) % experiment.eval_every == 0)
                    if shown:
                        split = data.test.head(experiment.eval_examples)
                        point["raw_accuracy"] = evaluate(new.params, split).accuracy
                        point["ema_accuracy"] = evaluate(new.ema, split).accuracy
                    # Together, so that an interrupted run keeps both or neither.
                    state, history = new, [*history, point] if shown else history
                    if last or from_first(int(time.monotonic() - saved > checkpoint_every)):
                        save()
                        saved = time.monotonic()
                    progress.advance(point)
            finally:  # an interrupted run loses nothing that it paid for
                save()
                checkpoints.close()
        events = by_first(ledger.events)
    return Run(
        experiment=experiment,
        params=jax.tree.map(gathered, state.params),
        ema_params=jax.tree.map(gathered, state.ema),
        history=history,
        raw=evaluate(state.params, data.test),
        ema=evaluate(state.ema, data.test),
        events=events,
        steps=int(state.step),
        seconds=before + (time.monotonic() if int(state.step) > start else began),
        devices=hardware(used),
        public=public,
        stopped=stopped,
    )


def open_ledger(journal: pathlib.Path | None, *terms, **more) -> Ledger:
    """The run's ledger on the first process, an empty one in memory on the others; errors are raised on all."""
    opened = []
    by_first(lambda: opened.append(Ledger(journal, *terms, **more)))
    return opened[0] if opened else Ledger(None, *terms, **more)


REMEDY = "the run ends with those before it: lower the learning rate"
DECISIVE_FLAGS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_softmax_custom_jvp", "jax_disable_jit",
)  # fmt: skip


def hardware(devices: list[jax.Device]) -> str:
    """Number and kind of the devices, and the version of JAX."""
    return f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"


def settings_of(experiment: Experiment, data: Dataset, devices: list[jax.Device]) -> str:
    """SHA-256 (hex) of what is known to decide how a program rounds: where it differs, noise is drawn afresh.

    Incomplete as any such list, and only there to avoid surprises: that a repeated update is the same is
    found from its bits (`dpnb.replay`).
    """
    found = {name: getattr(experiment, name) for name in ("form", "remat", "shard")}
    found |= {
        "call": call_size(experiment),
        "memory": memory_limit(devices),
        "processes": jax.process_count(),
    }
    found |= {"hardware": hardware(devices), "code": code(), **versions(data)}
    found |= {name: str(getattr(jax.config, name, None)) for name in DECISIVE_FLAGS}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def make_alive(trainer: Trainer, data: Dataset) -> Callable[[Any], bool]:
    """A function of parameters: do they give finite outputs for public inputs?

    It reads nothing but released parameters and random images, so that ending a run by it costs no privacy.
    """
    inputs = noise_images(data)
    finite = jax.jit(lambda params: jnp.isfinite(trainer.apply(params, inputs)).all())
    return lambda params: bool(gathered(finite(params)))


def versions(data: Dataset) -> dict[str, str]:
    """What else decides about the last bits: of the compiler, and of what decodes photographs."""
    found = {"jaxlib": jaxlib.__version__, "flax": flax.__version__, "optax": optax.__version__}
    found |= {"numpy": np.__version__, "flags": os.environ.get("XLA_FLAGS", "")}
    if isinstance(data.train, Photographs):
        from PIL import __version__
        from PIL import features as codecs

        found |= {"pillow": __version__, "jpeg": str(codecs.version("jpg"))}
    return found


def agree(seed: int) -> None:
    """Processes must have the same seed, and so (it is derived from them) the same experiment and data.

    Raises:
      ValueError: some do not agree with the first; on all of them, so that none waits for another.
    """
    known = seed % 2**63
    if any_process(from_first(known) != known):
        raise ValueError(
            "all processes must have the same seed, experiment and data, but some differ from the first; give them "
            "one directory that all see, and the same files"
        )


def check_size(experiment: Experiment, data: Dataset) -> None:
    """Photographs come at the size that the record will state.

    Raises:
      ValueError: they do not.
    """
    got = data.shape[0] if isinstance(data.train, Photographs) else 0
    if got != experiment.image_size and not isinstance(data, features.FeatureDataset):
        raise ValueError(
            f"{experiment.name}: image_size is {experiment.image_size}, got "
            f"{f'photographs of {got} pixels' if got else 'images in memory'}; load the data with "
            "image_size=experiment.image_size"
        )


def check_own_model(experiment: Experiment) -> None:
    """A model that is passed in begins and trains as it is.

    Raises:
      ValueError: the experiment says otherwise, and its record would.
    """
    if experiment.pretrained or experiment.trainable != "all":
        raise ValueError(
            f"{experiment.name}: a model of your own begins and trains as it is; leave pretrained and "
            f"trainable at their defaults, got {experiment.pretrained!r} and {experiment.trainable!r}"
        )


def check_outputs(model: nnx.Module, data: Dataset) -> None:
    """One logit per class, before anything is spent.

    Raises:
      ValueError: the model's outputs are not [batch, classes].
    """
    got = nnx.eval_shape(lambda: model(noise_images(data))).shape
    expected = (len(noise_images(data)), len(data.classes))
    if got != expected:
        raise ValueError(
            f"the model must return one logit for each of {len(data.classes)} classes, {list(expected)}, "
            f"got {list(got)}; set its number of classes"
        )


def curve_point(step: int, seen: Seen, epsilon: float) -> dict[str, Any]:
    """One point of the curve. All but step and epsilon are training statistics, not private."""
    seen = Seen(*[float(gathered(x)) for x in seen])
    n, finite = max(seen.examples, 1.0), seen.examples - seen.nonfinite
    return {
        "step": step,
        "epsilon": epsilon,
        "batch_size": int(seen.examples),
        "train_loss": seen.loss / max(finite, 1.0) if finite or not seen.examples else math.nan,
        "train_accuracy": 100 * seen.right / n,
        "mean_norm": seen.norm / n,
        "clipped_fraction": seen.clipped / n,
        "nonfinite": int(seen.nonfinite),
        "unreadable": int(seen.unreadable),
    }


def accounting_grid(steps: int, points: int = 8) -> list[int]:
    """Numbers of updates at which epsilon is computed for plots and progress, the last included."""
    return [int(n) for n in np.unique(np.linspace(1, steps, points).astype(int))]


def epsilon_spent(mechanism: privacy.Mechanism, experiment: Experiment) -> Callable[[int], float]:
    """A cheap function of the number of steps, those charged twice counted twice -> epsilon, never below the true one.

    Exact at the points of the curve (up to 30 of them); between two, the later one's epsilon is given; and
    that of the budget where steps were charged twice, so that there are more than the experiment's.
    """
    every = experiment.eval_every or experiment.steps
    grid = [*range(every, experiment.steps, every), experiment.steps]
    grid = grid if len(grid) <= 30 else accounting_grid(experiment.steps)
    try:
        curve = privacy.epsilon_curve(mechanism, grid, experiment.delta, experiment.accountant)
    except privacy.MissingAccountant:
        return lambda step: math.nan
    curve = [*curve, experiment.epsilon]
    return lambda charged: float(curve[np.searchsorted(grid, charged)])


def noise_images(data: Dataset, n: int = 4) -> np.ndarray:
    """Random images of the data's shape, float32 [n, h, w, c]: no training data is touched."""
    shape = (n, *data.shape)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
