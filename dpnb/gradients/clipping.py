"""Clipped gradients: the mean over the views, clipped for each example, summed over the examples."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpnb.gradients.platform import platform
from dpnb.gradients.views import wide
from dpnb.privacy import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM

PyTree = Any
# On CPU, gradients of at most FEW examples are added one by one if they are of convolutions, or floats and more than
# LARGE numbers each.
FEW = 64
LARGE = 2**12
FORMS = ("materialised", "two-pass")
SHARE = 0.4  # part of the memory of a device that per-example gradients may take
# Gradients on a grid are clipped below the clip norm by this fraction, to make room for the rounding of norms.
MARGIN = 2**-13
# With loss scaling, exponents of two: of the scaled loss, and of the largest scale.
SCALED_LOSS = 10
LARGEST_SCALE = 20
LANES = 256  # number of squares that are added up at a time


class NonPrivate(NamedTuple):
    """What happened to each example. NOT differentially private: for debugging and plots, not for release.

    norms: float32 [examples], gradient norms before clipping (NaN or Inf if not finite).
    losses: float32 [examples], means over the views.
    aux: what the loss returned beside its value, with a leading examples axis.

    Norms and losses of masked examples are zero; their aux is meaningless.
    """

    norms: jax.Array
    losses: jax.Array
    aux: PyTree


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """Computes the sum over examples of clipped gradients. `clipped_grad` makes it and documents the fields."""

    loss: Callable[..., Any]
    clip_norm: float
    rescale_to_unit_norm: bool
    has_aux: bool
    microbatch_size: int | None
    form: str = "materialised"
    grid_bits: int | None = None
    loss_scaling: bool = False

    @property
    def sensitivity(self) -> float:
        """Bound on the l2 norm of the change of the sum when one example is added or removed.

        It is `clip_norm`, 1 if gradients are rescaled to unit norm, and inf without clipping. It holds in both forms,
        for any examples, parameters and loss function. On a grid it holds without exception: the integers of one
        example have a norm of at most 2^grid_bits, and their sum is exact. In floats it holds up to rounding: the
        vector that is added for one example may be longer by a relative 1e-6 (the tests measure it in float64, also
        with two million weights), and every addition rounds the sum itself by a relative 6e-8.
        """
        return 1.0 if self.rescale_to_unit_norm else self.clip_norm

    @property
    def unit(self) -> float:
        """The value of one unit of the sum: 1 for floats, sensitivity / 2^grid_bits on a grid."""
        return 1.0 if self.grid_bits is None else self.sensitivity / 2**self.grid_bits

    def __call__(
        self, params: PyTree, examples: PyTree, mask: jax.Array | None = None, total: PyTree | None = None
    ) -> tuple[PyTree, NonPrivate]:
        """Adds the clipped gradients of `examples` to `total`.

        Args:
          params: pytree of floating arrays, the point at which to differentiate.
          examples: pytree of arrays that share their leading axis, [examples, ...].
          mask: bool [examples]; False marks padding, whose content makes no difference.
          total: the sum so far, a pytree like `params` of float32, or of int32 on a grid; zero by default.
        Returns:
          (sum, `NonPrivate`). The sum is a pytree like `params`, of float32 (float64 if `params` are), or of int32 in
          `unit`s, modulo 2^32.
        Raises:
          ValueError: `microbatch_size` does not divide the number of examples, or the arrays of `examples` and
            `mask` disagree on that number.
          TypeError: parameters or losses are not real floating numbers, so no gradient has a norm to be clipped.
        """
        size = jax.tree.leaves(examples)[0].shape[0]
        mask = jnp.ones(size, bool) if mask is None else mask
        for leaf in jax.tree.leaves(params):
            _check_floating(leaf, "parameters")
        if total is None:
            total = jax.tree.map(self._zeros, params)
        lengths = {x.shape[:1] for x in jax.tree.leaves((examples, mask))}
        if lengths != {(size,)}:
            raise ValueError(f"examples and mask must share their first axis, got lengths {sorted(lengths)}")
        micro = min(self.microbatch_size or size, size)
        if size % micro:
            raise ValueError(
                f"microbatch_size must divide the number of examples, got {micro} and {size}; "
                "pad the examples and mask the padding"
            )
        infos = []
        # Unrolled, not scanned: XLA:CPU runs convolutions inside loops many times slower,
        # and it overlaps neighbouring microbatches (two of them on two cores).
        for start in range(0, size, micro):
            chunk = jax.tree.map(lambda x, a=start: x[a : a + micro], (examples, mask))
            total, info = self._add(params, total, *chunk)
            infos.append(info)
        return total, jax.tree.map(lambda *xs: jnp.concatenate(xs), *infos)

    def _zeros(self, p: jax.Array) -> jax.Array:
        """The empty sum of one parameter."""
        return jnp.zeros(p.shape, _accumulator(p) if self.grid_bits is None else jnp.int32)

    def _add(
        self, params: PyTree, total: PyTree, examples: PyTree, mask: jax.Array
    ) -> tuple[PyTree, NonPrivate]:
        """`total` plus the clipped gradients of one microbatch."""
        (losses, aux), grads = jax.vmap(self._value_and_grad, (None, 0))(params, examples)
        squares = jax.tree.map(_squares, grads)
        norms = jnp.sqrt(sum(jax.tree.leaves(squares)))
        # Selected, not multiplied by zero: zero times NaN is NaN.
        included = mask & _finite(norms)
        factor = self._factor(jnp.where(included, norms, 1.0))
        few = platform() == "cpu" and len(norms) <= FEW

        def add(total: jax.Array, g: jax.Array, factor: jax.Array, included: jax.Array) -> jax.Array:
            # Kernels of convolutions come one by one, see `dpnb.gradients.batching`. To reduce large arrays of floats
            # takes XLA:CPU in JAX 0.10 forty times as long as to add them.
            slow = g.ndim > 3 or (total.size > LARGE and jnp.issubdtype(total.dtype, jnp.floating))
            return (_add_one_by_one if few and slow else _add_reduced)(total, g, factor, included)

        info = NonPrivate(jnp.where(mask, norms, 0), jnp.where(mask, losses, 0), aux)
        if self.form == "materialised":
            return jax.tree.map(lambda total, g: add(total, g, factor, included), total, grads), info

        def add_again(total: jax.Array, g: jax.Array, squares: jax.Array) -> jax.Array:
            g = wide(g)
            allowed, now = jnp.sqrt(squares), jnp.sqrt(_squares(g))
            within = jnp.where(now > allowed, allowed / now, 1)
            return add(total, g, factor * within, included & _finite(now))

        again = self._second_pass(params, examples, norms, losses)
        return jax.tree.map(add_again, total, again, squares), info

    def _mean_loss(self, params: PyTree, example: PyTree) -> tuple[jax.Array, PyTree]:
        """(mean of the loss over the views, aux)."""
        value = self.loss(params, example)
        value, aux = value if self.has_aux else (value, ())
        _check_floating(value, "the loss")
        return jnp.mean(wide(value)), aux

    def _value_and_grad(self, params: PyTree, example: PyTree) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        """((loss, aux), gradient) of one example, the gradient at least in float32."""
        loss, pull_back, aux = jax.vjp(lambda p: self._mean_loss(p, example), params, has_aux=True)
        scale = self._scale(loss)
        return (loss, aux), _divided(pull_back(scale)[0], scale)

    def _second_pass(self, params: PyTree, examples: PyTree, norms: jax.Array, losses: jax.Array) -> PyTree:
        """The gradients once more, in a way that XLA cannot merge with the first pass.

        XLA would merge equal computations and keep the gradients between them. Each loss is therefore multiplied by a
        one that depends on the norm (by zero if the norm is NaN; such examples are not included).
        """
        one = jnp.where(norms >= 0, 1, 0).astype(norms.dtype)

        def gradient(params: PyTree, example: PyTree, one: jax.Array, loss: jax.Array) -> PyTree:
            scale = self._scale(loss)
            return _divided(jax.grad(lambda p: one * scale * self._mean_loss(p, example)[0])(params), scale)

        return jax.vmap(gradient, (None, 0, 0, 0))(params, examples, one, losses)

    def _scale(self, loss: jax.Array) -> jax.Array:
        """By what the loss of an example is multiplied before it is differentiated, a power of two.

        It brings losses near `SCALED_LOSS`, as far as `LARGEST_SCALE` goes.
        """
        if not self.loss_scaling:
            return jnp.ones_like(loss)
        bits = jax.lax.bitcast_convert_type(loss.astype(jnp.float32), jnp.int32)
        exponent = ((bits >> 23) & 255) - 127  # of two, rounded down
        power = jnp.clip(SCALED_LOSS - exponent, 0, LARGEST_SCALE)
        return jax.lax.bitcast_convert_type((power + 127) << 23, jnp.float32).astype(loss.dtype)

    def _factor(self, norms: jax.Array) -> jax.Array:
        """The factors that clip gradients of these norms."""
        if math.isinf(self.clip_norm):
            return jnp.ones_like(norms)
        clipped = self.clip_norm if not self.rescale_to_unit_norm else 1.0
        if self.grid_bits is not None:
            clipped = (1 - MARGIN) * 2**self.grid_bits
        return clipped / jnp.maximum(norms, self.clip_norm)


def _divided(grads: PyTree, scale: jax.Array) -> PyTree:
    """The gradients in float32 or more, divided by the scale of the loss."""
    return jax.tree.map(lambda g: wide(g) / scale.astype(_accumulator(g)), grads)


def _squares(g: jax.Array) -> jax.Array:
    """The sum of squares of each example, axis by axis, at most `LANES` terms at a time.

    In whatever order the terms are added, each level rounds by a relative 256 * 2^-24 = 2^-16 at most, and no parameter
    of a network needs more than four full levels. A plain sum of millions of terms may drift by far more.
    """
    squares = jnp.square(g)
    while squares.ndim > 1:
        squares = jnp.abs(_level(squares))  # changes nothing, but XLA would merge bare levels
    return squares


def _finite(x: jax.Array) -> jax.Array:
    """As `jnp.isfinite`, but from the bits, because some compiler options assume that no number is NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint64)
    exponent = jnp.array(jnp.inf, x.dtype).view(bits.dtype)
    return (bits & exponent) != exponent


def _level(x: jax.Array) -> jax.Array:
    """Sums over the last axis, or over groups of `LANES` neighbours if that axis is longer."""
    *lead, last = x.shape
    if last <= LANES:
        return x.sum(-1)
    whole = last // LANES * LANES
    sums = x[..., :whole].reshape(*lead, -1, LANES).sum(-1)
    return jnp.concatenate([sums, x[..., whole:].sum(-1, keepdims=True)], -1) if last > whole else sums


def _add_one_by_one(total: jax.Array, g: jax.Array, factor: jax.Array, included: jax.Array) -> jax.Array:
    """total + sum of factor * g over the included examples, in one fused pass; for few examples on CPU."""
    for i in range(g.shape[0]):
        scaled = (g[i] * factor[i].astype(g.dtype)).astype(total.dtype)  # to integers: towards zero
        total = total + jnp.where(included[i], scaled, jnp.zeros_like(scaled))
    return total


def _add_reduced(total: jax.Array, g: jax.Array, factor: jax.Array, included: jax.Array) -> jax.Array:
    """The same as a reduction, whose program has the same size for any number of examples.

    It is not a matrix product, which accelerators would round to half precision.
    """
    over = [-1] + [1] * (g.ndim - 1)
    scaled = (g * factor.astype(g.dtype).reshape(over)).astype(total.dtype)
    return total + jnp.where(included.reshape(over), scaled, jnp.zeros_like(scaled)).sum(0, dtype=total.dtype)


def _check_floating(x: Any, what: str) -> None:
    """Raises TypeError if `x` is not of real floating numbers."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"{what} must be real floating numbers, got {jnp.result_type(x)}; use float32 "
            "(a complex number as two real ones)"
        )


def _accumulator(x: Any) -> jnp.dtype:
    """The dtype of clipping and sums, at least float32: neither is ever done in half precision."""
    return jnp.promote_types(x.dtype, jnp.float32)


def clipped_grad(
    loss: Callable[..., Any],
    clip_norm: float,
    *,
    rescale_to_unit_norm: bool = False,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    form: str = "materialised",
    grid_bits: int | None = None,
    loss_scaling: bool = False,
) -> ClippedGrad:
    """The sum over examples of gradients clipped to `clip_norm` (paper, sections 2 and 3).

    The gradient of an example is that of the mean of `loss`. If the loss returns one value per view (augmentation
    multiplicity, paper section 3.2), the mean over the views is inside the clip, so an example counts once however
    many views it has.

    Formal guarantees: the sum changes by at most `.sensitivity` in l2 norm when one example is added or removed, for
    any parameters and any example. `vmap` isolates the examples, so not even a batch norm can mix them. An example whose
    gradient norm is NaN, infinite or beyond the range of float32 contributes exactly zero.

    With `grid_bits` the sum is a sum of integers: each clipped gradient is rounded towards zero, which never lengthens
    it, to multiples of sensitivity / 2^grid_bits, and added up in int32. The sum of integers does not depend on their
    order or on the number of devices, and the sensitivity is exact. `dpnb.privacy.noise` explains why the noise is then
    exactly the noise of the accountant. On a grid gradients are clipped to 1 - 2^-13 of the clip norm, a larger margin
    than the error of a norm in floats (`_squares`).

    Two forms compute the same sum. "materialised" keeps the gradients of all examples until their norms are known.
    "two-pass" is for models whose gradients do not fit in memory. Its first pass reduces the gradient of each example
    to a sum of squares, parameter by parameter. The second pass computes the gradient again (the forward pass is shared
    if XLA keeps it), clips it and adds it up. Only the gradients of one layer need to be alive at a time. The second
    pass measures the gradient of each example and parameter anew, and shortens it if it is longer than in the first
    pass: even if the passes round differently, nothing beyond the clip is added. The guarantee is that of the first
    form, in any precision of the loss.

    One ordinary gradient of the sum of scaled losses would be a faster second pass. It would break the guarantee in
    floating point, because it adds terms of different examples before they are clipped: two views of one example with
    gradients 1e10 and -1e10 have norm zero, but round away the gradients of the other examples.

    Args:
      loss: pure function `loss(params, example)` of a pytree of parameters and one example (a pytree without the
        examples axis). It returns a floating scalar, or an array with one loss per view; with `has_aux`, a pair of
        that and a pytree.
      clip_norm: C > 0, the maximal l2 norm of the gradient of one example; `inf` for no clipping.
      rescale_to_unit_norm: divide by C after clipping, as in the paper's update, so that the learning rate does not
        depend on C. The sensitivity is then 1.
      has_aux: whether `loss` returns a pair (value, aux).
      microbatch_size: the number of examples that are differentiated at a time; on CPU two microbatches then run side
        by side. It changes the result only by rounding. XLA:CPU adds up all microbatches of a call at its end, so
        smaller microbatches do not save the memory of materialised gradients; fewer examples per call do.
      form: "materialised", or "two-pass" (less memory, about twice the time); see `choose_form`. XLA:CPU orders
        operations for speed. It returns more memory if compiled with
        `xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"` among `compiler_options`.
      loss_scaling: for networks that compute in float16, whose smallest numbers are too large for most gradients.
        Each loss is multiplied by a power of two that follows from itself, so that it is about 1,000, and the gradient
        is divided by it, exactly, in float32 before the norm. An example whose gradient overflows float16
        contributes zero, like any other that is not finite.
      grid_bits: None for a sum of floats; 0 to 24 for a sum of integers in units of sensitivity / 2^grid_bits. Sums
        beyond 31 bits wrap around, see `dpnb.privacy.noise.grid_bits`.
    Returns:
      A function `(params, examples, mask=None, total=None) -> (sum, NonPrivate)` that can be jitted. Its `.sensitivity`
      is the l2 sensitivity of the sum.
    Raises:
      ValueError: `clip_norm` is not positive, below 1e-12, finite and above 1e18, or infinite together with rescaling
        or a grid; `microbatch_size` is below 1; `form` is neither form; or `grid_bits` is out of range.

    >>> import jax.numpy as jnp
    >>> grad = clipped_grad(lambda w, x: w @ x, clip_norm=5.0)
    >>> total, info = grad(jnp.zeros(2), jnp.array([[3.0, 4.0], [6.0, 8.0]]))
    >>> print(total, info.norms, grad.sensitivity)
    [6. 8.] [ 5. 10.] 5.0
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")
    if clip_norm < SMALLEST_CLIP_NORM:
        raise ValueError(
            f"clip_norm must be at least {SMALLEST_CLIP_NORM}, got {clip_norm}: squares of smaller gradients are zero in "
            "float32, and nothing would be clipped; scale the loss"
        )
    if LARGEST_CLIP_NORM < clip_norm < math.inf:
        raise ValueError(
            f"clip_norm must be at most {LARGEST_CLIP_NORM}, or inf, got {clip_norm}: squares of such gradients are "
            "beyond float32; scale the loss"
        )
    if math.isinf(clip_norm) and (rescale_to_unit_norm or grid_bits is not None):
        what = "rescale_to_unit_norm" if rescale_to_unit_norm else "grid_bits"
        raise ValueError(f"{what} needs a finite clip_norm, got inf; turn one of them off")
    if grid_bits is not None and not 0 <= grid_bits <= 24:
        raise ValueError(f"grid_bits must be 0 to 24, the digits of float32, or None, got {grid_bits}")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(
            f"microbatch_size must be at least 1, or None for all at once, got {microbatch_size}"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return ClippedGrad(
        loss, float(clip_norm), rescale_to_unit_norm, has_aux, microbatch_size, form, grid_bits, loss_scaling
    )


def choose_form(params: PyTree, examples: int, memory_bytes: int) -> tuple[str, str]:
    """The form of the clipped gradient that fits the memory, and a sentence that says why.

    Args:
      params: pytree of arrays or of their shapes (`jax.ShapeDtypeStruct`); nothing is allocated.
      examples: the number of examples whose gradients are alive at a time, those of one call on one device.
      memory_bytes: all the memory that the device has for arrays, used or free.
    Returns:
      ("materialised", why) if the float32 gradients of the examples take at most 40 % of the memory (the rest is for
      parameters, activations, the sum and the optimizer), else ("two-pass", why).
    Raises:
      ValueError: `examples` is below 1.

    >>> print(*choose_form(jax.ShapeDtypeStruct((2**20, 25), "float32"), 8, 2**30), sep=": ")
    two-pass: gradients of 8 examples, 100.0 MiB each, take 800.0 MiB, more than 40 % of the 1.0 GiB of the device
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    one = sum(math.prod(p.shape) * _accumulator(p).itemsize for p in jax.tree.leaves(params))
    fits = examples * one <= SHARE * memory_bytes
    return FORMS[0] if fits else FORMS[1], (
        f"gradients of {examples} examples, {_size(one)} each, take {_size(examples * one)}, "
        f"{'at most' if fits else 'more than'} {100 * SHARE:.0f} % of the {_size(memory_bytes)} of the device"
    )


def _size(bytes_: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{bytes_ / 2**30:.1f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.1f} MiB"
