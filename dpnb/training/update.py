"""Compiles the pieces of one update: accumulate on every device, then update once.

augment -> per-example gradient -> mean over views -> clip -> sum | all-reduce -> noise
-> / expected batch -> optimizer -> EMA
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dpnb.data import Dataset, Recipe, augment
from dpnb.experiments import Experiment
from dpnb.gradients import ClippedGrad, choose_form, clipped_grad, formulation, formulation_in_force
from dpnb.models import functional, structure
from dpnb.models.precision import resolved
from dpnb.models.registry import make_model
from dpnb.privacy import sampling
from dpnb.privacy.noise import GridNoise, grid_bits
from dpnb.training.devices import examples_per_microbatch, memory_limit, per_device_batch_size
from dpnb.training.feeding import Feed, make_feed
from dpnb.training.loss import make_loss
from dpnb.training.optimizer import make_optimizer
from dpnb.training.preconditions import check_noise
from dpnb.training.seeds import initial_rngs, root_key, step_key
from dpnb.training.sharding import AXIS, batch_sharding, put, replicated, state_shardings
from dpnb.training.state import Accumulator, BatchMetrics, PyTree, State


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled pieces of one experiment on one data set, from `make_trainer`."""

    experiment: Experiment
    sampler: sampling.Sampler  # which examples are in which update
    noise: GridNoise | None
    apply: Callable[[PyTree, jax.Array], jax.Array]
    grad: ClippedGrad
    form: str  # of the gradient, and why, in words
    compute_dtype: str  # of the network, see `dpnb.models.precision`
    mesh: Mesh
    places: State  # a sharding for each array of the state
    state: State  # before the first update
    feed: Feed  # of the training images; it borrows the sampler
    physical_batch_size: int  # examples, over all devices
    zero: Callable  # () -> Accumulator
    accumulate: Callable  # (params, totals, images, labels, indices, mask, key) -> Accumulator
    update: Callable  # (state, totals, noise) -> (State, BatchMetrics)


def reseeded(trainer: Trainer, seed: int) -> tuple[Trainer, jax.Array]:
    """Returns the same compiled pieces with sampling and noise of another seed, and its `State.key`."""
    noise = trainer.noise and dataclasses.replace(trainer.noise, seed=seed)
    sampler = dataclasses.replace(trainer.sampler, seed=seed)
    return dataclasses.replace(trainer, sampler=sampler, noise=noise), put(root_key(seed), trainer.places.key)


def make_trainer(
    experiment: Experiment,
    data: Dataset,
    *,
    seed: int,
    model: nnx.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    devices: list[jax.Device] | None = None,
    physical_batch_size: int | None = None,
    programs: dict[tuple, Callable] | None = None,
) -> Trainer:
    """Puts data and parameters on the devices; nothing is compiled or spent yet.

    Args:
      experiment: with `noise_multiplier` and `steps` known (see `dpnb.training.calibrate`).
      data: uint8 images, which are copied to every device, or photographs, which are read as needed.
      seed: of sampling, augmentation, noise and initial parameters. Releases of two experiments
        must not share it (`train` derives one from the seed and the experiment).
      model: any NNX model of images [batch, h, w, c] -> logits (default: the experiment's).
      optimizer: any Optax transformation (default: `make_optimizer(experiment)`).
      devices: form a one-dimensional mesh; default all devices of all processes.
      physical_batch_size: examples per device and call; default `per_device_batch_size(experiment)`.
      programs: gets this trainer's `accumulate`, unless it holds that of a trainer that would compile the same
        program; this one then takes it over, traced and compiled as it is. Code that was changed in between is
        not noticed. Models with other arrays than parameters (running statistics, frozen layers) share none.
    Raises:
      ValueError: noise_multiplier is None (0 means no noise), or there is noise but clip_norm is infinite.
    """
    check_noise(experiment)
    sigma = experiment.noise_multiplier
    n, devices = len(data.train), devices or jax.devices()
    mesh = Mesh(np.array(devices), (AXIS,))
    ran = resolved(experiment, devices[0])
    model = make_model(ran, len(data.classes), initial_rngs(seed)) if model is None else model
    params, apply = functional(model)
    optimizer = optimizer or make_optimizer(experiment)
    physical = physical_batch_size or per_device_batch_size(experiment)
    grad, form = make_gradient(ran, apply, params, mesh, physical, memory_limit(devices))
    if experiment.sampler == "poisson":
        sampler = sampling.PoissonSampler(n, experiment.expected_batch_size / n, seed)
    else:
        sampler = sampling.ShuffleSampler(n, experiment.expected_batch_size, seed)
    zero = jnp.zeros((), jnp.int32)
    state = State(zero, params, params, optimizer.init(params), root_key(seed))
    places = state_shardings(state, mesh, experiment.shard)._replace(key=replicated(mesh))
    feed = make_feed(data, experiment.augmult, mesh)
    shape = data.shape if feed.resident else None
    how = experiment.formulation if experiment.formulation != "auto" else formulation_in_force()
    accumulate = make_accumulate(grad, experiment.augmult, mesh, data.recipe, shape, how)
    network = structure(model) if programs is not None else None
    if network is not None:  # these decide the program; the loss follows from the network
        terms = network, dataclasses.replace(grad, loss=None), experiment.augmult, mesh, repr(data.recipe)
        accumulate = programs.setdefault((*terms, shape, how), accumulate)
    return Trainer(
        experiment=experiment,
        sampler=sampler,
        noise=GridNoise(seed, sigma, grad.grid_bits, jax.eval_shape(lambda: params)) if sigma else None,
        apply=apply,
        grad=grad,
        form=form,
        compute_dtype=ran.compute_dtype,
        mesh=mesh,
        places=places,
        state=jax.tree.map(put, state, places),
        feed=feed,
        physical_batch_size=physical * len(devices),
        zero=make_zero(jax.eval_shape(lambda: params), mesh, jnp.int32 if sigma else jnp.float32),
        accumulate=accumulate,
        update=make_update(experiment, grad.unit, optimizer, mesh, places),
    )


def make_gradient(
    experiment: Experiment, apply: Callable, params: PyTree, mesh: Mesh, physical: int, memory: int
) -> tuple[ClippedGrad, str]:
    """Returns the clipped gradient of an experiment's loss, and its form and why, in words.

    Args:
      experiment: with a compute_dtype that is not "auto".
      apply: `(params, inputs) -> logits`.
      params: pytree of arrays or of their shapes.
      mesh: of the devices that compute it; they need not be there.
      physical: examples per device and call.
      memory: bytes that a device has for arrays.
    """
    form, why = choose_form(params, physical, memory)
    if experiment.form != "auto":
        form, why = experiment.form, "asked for"
    micro = examples_per_microbatch(experiment.augmult)
    cpu = mesh.devices.flat[0].platform == "cpu"
    split = cpu and physical % micro == 0 and not experiment.on_features
    sigma = experiment.noise_multiplier
    grad = clipped_grad(
        make_loss(apply),
        experiment.clip_norm,
        rescale_to_unit_norm=math.isfinite(experiment.clip_norm),
        has_aux=True,
        microbatch_size=micro if split else None,
        form=form,
        grid_bits=grid_bits(sigma, experiment.expected_batch_size) if sigma else None,
        loss_scaling=experiment.compute_dtype == "float16",
    )
    return grad, f"{form} gradients ({why})"


def make_accumulate(
    grad: ClippedGrad,
    augmult: int,
    mesh: Mesh,
    recipe: Recipe,
    shape: tuple[int, ...] | None,
    how: str = "auto",
) -> Callable:
    """Returns the function of one physical batch: every device adds its clipped gradients to its partial sum.

    Args:
      augmult: number of views of each example.
      recipe: how images become inputs.
      shape: of one image, if images are those of the whole data set, one in a row (see `dpnb.training.feeding`);
        None if images and labels are those of the batch alone.
      how: the formulation of weight gradients, see `dpnb.gradients.convolution`.
    Returns:
      A function (params, totals, images, labels, indices, mask, key) -> `Accumulator`; totals are donated.
    """
    make_views = functools.partial(augment.views, augmult=augmult, recipe=recipe)

    def local(params, totals, images, labels, indices, mask, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)  # by example, not by place
        if shape is not None:
            images, labels = images[indices].reshape(-1, *shape), labels[indices]
        readable = labels >= 0  # the gradient of an image that cannot be read is zero
        mine = jax.tree.map(lambda t: t[0], totals)
        examples = jax.vmap(make_views)(keys, images), jnp.maximum(labels, 0)
        with formulation(how):
            gradient, info = grad(params, examples, mask & readable, mine.gradient)
        finite = jnp.isfinite(info.norms)
        new = BatchMetrics(
            examples=mask,
            loss=jnp.where(finite & jnp.isfinite(info.losses), info.losses, 0),
            correct=jnp.where(mask & readable, info.aux, 0),
            norm=jnp.where(finite, info.norms, 0),
            clipped=finite & (info.norms > grad.clip_norm),
            nonfinite=~finite,
            unreadable=mask & ~readable,
        )
        seen = jax.tree.map(lambda total, x: total + x.astype(jnp.float32).sum(), mine.seen, new)
        return jax.tree.map(lambda t: t[None], Accumulator(gradient, seen))

    one, split = PartitionSpec(), PartitionSpec(AXIS)
    images = split if shape is None else one
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(one, split, images, images, split, split, one),
        out_specs=split,
        check_vma=False,  # the convolution's own rules know nothing of varying types
    )
    return jax.jit(sharded, donate_argnums=1)


def make_update(experiment: Experiment, unit: float, optimizer, mesh, places: State) -> Callable:
    """Returns the update: all-reduce, noise once, division by the expected batch size, optimizer step, EMA.

    Args:
      unit: what one unit of the sum stands for.
      places: a sharding for each leaf of the state; sum and noise are divided like the parameters.
    Returns:
      A function (state, totals, noise) -> (State, BatchMetrics); noise is `GridNoise`'s, None for none.
    """

    def update(state: State, totals: Accumulator, noise: PyTree) -> tuple[State, BatchMetrics]:
        total = jax.tree.map(lambda t: t.sum(0, dtype=t.dtype), totals.gradient)
        seen = jax.tree.map(_sum_as_integers if noise is not None else jnp.sum, totals.seen)
        total = jax.lax.with_sharding_constraint(total, places.params)
        noisy = total if noise is None else jax.tree.map(jnp.add, total, noise)  # exact, modulo 2^32
        gradient = jax.tree.map(
            lambda g: g.astype(jnp.float32) * unit / experiment.expected_batch_size, noisy
        )
        changes, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, changes)
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(experiment.ema_decay, (1 + t) / (10 + t))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        return State(state.step + 1, params, ema, optimizer_state, state.key), seen

    # The state is not donated: an interrupted update leaves the state before it intact.
    return jax.jit(update, out_shardings=(places, replicated(mesh)))


def _sum_as_integers(x: jax.Array) -> jax.Array:
    """Sums float32 [devices] as part of an all-reduce of integers, so that an update on many devices needs only one.

    Every device puts the bits of its number in a place of its own.
    """
    bits = jnp.diag(jax.lax.bitcast_convert_type(x, jnp.int32)).sum(0, dtype=jnp.int32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).sum()


def make_zero(params: PyTree, mesh: Mesh, dtype) -> Callable[[], Accumulator]:
    """Returns a function that makes zeros for one logical batch, a partial sum on every device."""
    devices = mesh.devices.size

    def zero():
        gradient = jax.tree.map(lambda p: jnp.zeros((devices, *p.shape), dtype), params)
        return Accumulator(
            gradient, BatchMetrics(*[jnp.zeros(devices, jnp.float32)] * len(BatchMetrics._fields))
        )

    return jax.jit(zero, out_shardings=batch_sharding(mesh))


def draw_noise(trainer: Trainer, step: int) -> PyTree:
    """Draws the noise of one update and puts it on the devices; None if there is none."""
    return trainer.noise and jax.tree.map(put, trainer.noise(step), trainer.places.params)


def one_update(trainer: Trainer, state: State) -> tuple[State, BatchMetrics]:
    """Makes one private update with the examples that the sampler draws for this step; it charges nothing."""
    step, key = int(state.step), step_key(state.key, state.step)
    totals = trainer.zero()
    for batch in trainer.feed.batches(trainer.sampler, step, trainer.physical_batch_size):
        totals = trainer.accumulate(state.params, totals, *batch, key)
    noise = draw_noise(trainer, step)  # on the host, while the devices still add up
    return trainer.update(state, totals, noise)


def inputs(trainer: Trainer, state: State, totals: Accumulator, indices, mask, key) -> tuple:
    """Returns the arguments of `trainer.accumulate` for these examples of a data set in memory."""
    return state.params, totals, *trainer.feed.batch(indices, mask), key


def masked_batch(trainer: Trainer, size: int) -> tuple:
    """Returns the arguments of `trainer.accumulate` for `size` masked examples per device."""
    key = step_key(trainer.state.key, trainer.state.step)
    return trainer.state.params, trainer.zero(), *trainer.feed.blank(size * trainer.mesh.devices.size), key
