"""The clipped-gradient core: mean over views, clip per example, sum."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpnb.privacy import SMALLEST_CLIP_NORM

PyTree = Any
FEW = 64  # examples whose gradients are added one by one on CPU


class NonPrivate(NamedTuple):
    """What each example did. NOT differentially private: for debugging and plots, not release.

    norms: float32 [examples], gradient norms before clipping (NaN or Inf where non-finite).
    losses: float32 [examples], mean over views.
    aux: whatever the loss returned beside its value, with a leading examples axis.
    Norms and losses of masked examples are zero; their aux is meaningless.
    """

    norms: jax.Array
    losses: jax.Array
    aux: PyTree


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """Sum over examples of clipped gradients; made by `clipped_grad`."""

    loss: Callable[..., Any]
    clip_norm: float
    rescale_to_unit_norm: bool
    has_aux: bool
    microbatch_size: int | None

    @property
    def sensitivity(self) -> float:
        """l2 bound on the change of the sum when one example is added or removed.

        `clip_norm`, or 1 where gradients are rescaled to unit norm; inf without clipping.
        Holds to float32 rounding (relative 1e-6), whatever the examples, the parameters
        and the loss function.
        """
        return 1.0 if self.rescale_to_unit_norm else self.clip_norm

    def __call__(
        self, params: PyTree, examples: PyTree, mask: jax.Array | None = None, total: PyTree | None = None
    ) -> tuple[PyTree, NonPrivate]:
        """Adds the clipped gradients of `examples` to `total`.

        Args:
          params: pytree of floating arrays, the point at which to differentiate.
          examples: pytree of arrays that share their leading axis [examples, ...].
          mask: bool [examples]; False marks padding, whose content never matters.
          total: pytree like `params`, float32: the sum so far (default: zero).
        Returns:
          (pytree like `params`, float32 (or float64 where `params` are): the sum;
          `NonPrivate`).
        Raises:
          ValueError: `microbatch_size` does not divide the number of examples, or arrays of
            `examples` and `mask` disagree on that number.
        """
        size = jax.tree.leaves(examples)[0].shape[0]
        mask = jnp.ones(size, bool) if mask is None else mask
        if total is None:
            total = jax.tree.map(lambda p: jnp.zeros(p.shape, _accumulator(p)), params)
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

    def _add(self, params, total, examples, mask):
        def mean_loss(params, example):
            value = self.loss(params, example)
            value, aux = value if self.has_aux else (value, ())
            return jnp.mean(value.astype(_accumulator(value))), aux  # the mean over views

        gradient = jax.vmap(jax.value_and_grad(mean_loss, has_aux=True), (None, 0))
        (losses, aux), grads = gradient(params, examples)
        grads = jax.tree.map(lambda g: g.astype(_accumulator(g)), grads)
        norms = jnp.sqrt(sum(jnp.square(g).sum(range(1, g.ndim)) for g in jax.tree.leaves(grads)))
        # Selected, not multiplied by zero: zero times NaN is NaN.
        used = mask & jnp.isfinite(norms)
        factor = self._factor(jnp.where(used, norms, 1.0))
        few = jax.default_backend() == "cpu" and len(norms) <= FEW
        add = _add_one_by_one if few else _add_reduced
        info = NonPrivate(jnp.where(mask, norms, 0), jnp.where(mask, losses, 0), aux)
        return jax.tree.map(lambda total, g: add(total, g, factor, used), total, grads), info

    def _factor(self, norms):
        if math.isinf(self.clip_norm):
            return jnp.ones_like(norms)
        clipped = self.clip_norm if not self.rescale_to_unit_norm else 1.0
        return clipped / jnp.maximum(norms, self.clip_norm)


def _add_one_by_one(total, g, factor, used):
    """total + sum of factor * g over the used examples, as one fused pass; for a few examples, on CPU."""
    for i in range(g.shape[0]):
        total = total + jnp.where(used[i], g[i] * factor[i].astype(g.dtype), 0)
    return total


def _add_reduced(total, g, factor, used):
    """The same as a reduction, of the same size whatever the number of examples.

    Not a matrix product, which would round to half precision there.
    """
    over = [-1] + [1] * (g.ndim - 1)
    return total + jnp.where(used.reshape(over), g * factor.astype(g.dtype).reshape(over), 0).sum(0)


def _accumulator(x) -> jnp.dtype:
    """At least float32: clipping and sums never happen in half precision."""
    return jnp.promote_types(x.dtype, jnp.float32)


def clipped_grad(
    loss: Callable[..., Any],
    clip_norm: float,
    *,
    rescale_to_unit_norm: bool = False,
    has_aux: bool = False,
    microbatch_size: int | None = None,
) -> ClippedGrad:
    """The sum over examples of gradients clipped to `clip_norm` (paper, section 2 and 3).

    For one example the gradient is that of the mean of `loss`; where the loss returns one
    value per view (augmentation multiplicity, paper section 3.2), the mean over the views
    is inside the clip, so an example counts once however many views it has.

    Formal guarantees: the sum changes by at most `.sensitivity` in l2 norm when one example
    is added or removed, for any parameters and any example: the examples are isolated by
    `vmap`, so not even a batch norm can mix them, and an example whose gradient norm is
    NaN, infinite or beyond the range of float32 contributes exactly zero.

    Args:
      loss: pure function `loss(params, example)` of a pytree of parameters and one example
        (a pytree without the examples axis). Returns a floating scalar, or an array of one
        loss per view; with `has_aux`, a pair of that and a pytree.
      clip_norm: C > 0, maximal l2 norm of one example's gradient; `inf` for no clipping.
      rescale_to_unit_norm: divide by C after clipping (the paper's update), so that the
        learning rate does not depend on C. The sensitivity is then 1.
      microbatch_size: examples differentiated at a time, to save memory or (on CPU) to let
        two microbatches run side by side. Never changes the result but by rounding.
    Returns:
      A function `(params, examples, mask=None, total=None) -> (sum, NonPrivate)` that can be
      jitted; its `.sensitivity` is the l2 sensitivity of the sum.
    Raises:
      ValueError: `clip_norm` is not positive or below 1e-12, or infinite together with rescaling;
        `microbatch_size` below 1.

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
    if rescale_to_unit_norm and math.isinf(clip_norm):
        raise ValueError("rescale_to_unit_norm needs a finite clip_norm, got inf; turn one of them off")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(
            f"microbatch_size must be at least 1, or None for all at once, got {microbatch_size}"
        )
    return ClippedGrad(loss, float(clip_norm), rescale_to_unit_norm, has_aux, microbatch_size)
