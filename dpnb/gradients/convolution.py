"""A convolution with a fast weight gradient per example.

`vmap(grad(loss))` over examples turns the weight gradient of a convolution into a grouped convolution, which every
backend runs slowly. This module gives that one operation its own batching rule (`jax.custom_batching.custom_vmap`).
User code remains `vmap(grad(loss))`, and the numbers remain exact. Pass `conv_general_dilated` to any Flax convolution:
`nnx.Conv(..., conv_general_dilated=dpnb.gradients.convolution.conv_general_dilated)`.

The fastest formulation depends on backend and shape, so it can be chosen:

===================  =============================================================
``unrolled``         one ordinary weight-gradient convolution for each example
``unrolled_im2col``  all kernel offsets side by side, one matrix product for each example
``sliced``           for each kernel offset, one batched matrix product over examples
``im2col``           all offsets side by side, a single batched matrix product
``grouped``          one grouped convolution, as JAX does without this module
``grouped_im2col``   ``grouped``, but ``im2col`` for strides and for kernels of one pixel
``auto``             by device and shape: as measured on CPU by benchmarks/clipped_gradient.py and
                     on an H100 by benchmarks/weight_gradients.py; where nothing was measured, what
                     benchmarks/compiled.py finds best: ``grouped`` on TPU, ``grouped_im2col`` on
                     GPUs before Ampere
===================  =============================================================

Reverse-over-reverse differentiation is not supported (the gradient of a gradient).
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpnb.gradients.platform import computes_bfloat16, device, platform
from dpnb.gradients.views import wide

FORMULATIONS = ("auto", "unrolled", "unrolled_im2col", "sliced", "im2col", "grouped", "grouped_im2col")
_formulation = "auto"
Padding = tuple[tuple[int, int], ...]
Shape = tuple[int, ...]


class Spec(NamedTuple):
    """The static arguments of a convolution; padding is given as (low, high) pairs."""

    strides: Shape
    padding: Padding
    dilation: Shape
    groups: int
    precision: Any = None


@contextlib.contextmanager
def formulation(name: str) -> Iterator[None]:
    """Chooses the formulation of weight gradients for everything that is traced inside the block.

    Raises:
      ValueError: the name is not one of `FORMULATIONS`.

    >>> with formulation("im2col"):
    ...     pass  # trace, or call for the first time, what should use it
    """
    if name not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {FORMULATIONS}, got {name!r}")
    global _formulation
    before, _formulation = _formulation, name
    try:
        yield
    finally:
        _formulation = before


def formulation_in_force() -> str:
    """Returns the formulation that is chosen for what is traced now."""
    return _formulation


def _dimension_numbers(rank: int) -> tuple[str, str, str]:
    """The channels-last layout of a convolution with `rank` spatial dimensions."""
    spatial = "DHW"[3 - rank :]
    return ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")


def _forward(x: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    """The convolution itself."""
    return lax.conv_general_dilated(
        x, w, spec.strides, spec.padding, rhs_dilation=spec.dilation,
        dimension_numbers=_dimension_numbers(len(spec.strides)),
        feature_group_count=spec.groups, precision=spec.precision,
    )  # fmt: skip


def _kernel_slices(x: jax.Array, kernel: Shape, out: Shape, spec: Spec) -> Iterator[jax.Array]:
    """For each kernel offset, the inputs that it multiplies, [examples, views, *out, channels]."""
    lead = x.ndim - len(kernel) - 1
    none = [(0, 0, 0)] * lead
    # lax.pad also crops if a padding is negative.
    x = lax.pad(x, jnp.zeros((), x.dtype), [*none, *[(lo, hi, 0) for lo, hi in spec.padding], (0, 0, 0)])
    for offset in itertools.product(*map(range, kernel)):
        start = [o * d for o, d in zip(offset, spec.dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, out, spec.strides, strict=True)]
        yield lax.slice(
            x,
            [0] * lead + start + [0],
            [*x.shape[:lead], *stop, x.shape[-1]],
            [1] * lead + list(spec.strides) + [1],
        )


def _products(x: jax.Array, g: jax.Array, w_shape: Shape, spec: Spec, im2col: bool) -> jax.Array:
    """The weight gradients of the examples as batched matrix products.

    x [examples, views, *in, cin], g [examples, views, *out, cout] -> [examples, *w_shape].
    """
    kernel, groups = w_shape[:-2], spec.groups
    cin, cout = w_shape[-2], w_shape[-1] // groups
    out = g.shape[2:-1]
    examples, positions = g.shape[0], math.prod(g.shape[1:-1])
    g = g.reshape(examples, positions, groups, cout)
    slices = [s.reshape(examples, positions, groups, cin) for s in _kernel_slices(x, kernel, out, spec)]
    product = functools.partial(jnp.einsum, "bpgi,bpgo->bigo", precision=spec.precision)
    if im2col:
        d = product(jnp.concatenate(slices, axis=-1), g)
        return d.reshape(examples, *kernel, cin, groups * cout)
    d = jnp.stack([product(s, g) for s in slices], axis=1)
    return d.reshape(examples, *w_shape)


def _one(x: jax.Array, g: jax.Array, w_shape: Shape, spec: Spec) -> jax.Array:
    """The ordinary weight gradient, summed over everything in the batch."""
    zero = jnp.zeros(w_shape, g.dtype)
    (d,) = jax.linear_transpose(lambda w: _forward(x, w, spec), zero)(g)
    return d


def _grouped(x: jax.Array, g: jax.Array, w_shape: Shape, spec: Spec) -> jax.Array:
    """The weight gradients of the examples as one grouped convolution.

    Compilers may give all groups one kernel with zeros between them (XLA:CPU does), and zero times NaN would take the
    NaN of one example to all others. What is not finite is therefore left out, and the gradient of its example is
    NaN. On TPUs groups are compiled as the batch dimensions of a matrix product are, which keeps them apart.
    """
    one: Callable[..., jax.Array] = lambda x, g: _one(x, g, w_shape, spec)
    convolved: Callable[..., jax.Array] = jax.vmap(one)
    if platform() == "tpu":
        return convolved(x, g)
    x, whole_x = _without_nan(x)
    g, whole_g = _without_nan(g)
    d = convolved(x, g)
    return jnp.where(
        jnp.expand_dims(whole_x & whole_g, tuple(range(1, d.ndim))), d, jnp.full_like(d, jnp.nan)
    )


def _without_nan(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x [examples, views, ...] with zeros for what is not finite, bool [examples]: whether there was nothing).

    The sums that tell are those of the gradient of a bias, so that compilers make them once.
    """
    flat = x.reshape(-1, *x.shape[2:])  # as the layers around, see `dpnb.gradients.views`
    clean = jnp.where(jnp.isfinite(flat), flat, jnp.zeros_like(flat)).reshape(x.shape)
    sums = wide(flat).sum(tuple(range(1, flat.ndim - 1)))
    return clean, jnp.isfinite(sums).all(1).reshape(x.shape[:2]).all(1)


def _choose(g_shape: Shape, w_shape: Shape, spec: Spec) -> str:
    """The formulation for this device and shape, one that is the same for all shapes."""
    how = _formulation if _formulation != "auto" else _automatic(g_shape, w_shape, spec)
    if how == "grouped_im2col":
        pixel = math.prod(w_shape[:-2]) == 1
        return "im2col" if pixel or max(spec.strides) > 1 else "grouped"
    return how


def _automatic(g_shape: Shape, w_shape: Shape, spec: Spec) -> str:
    """The fastest formulation that is known for this device and shape."""
    if platform() == "tpu":
        return "grouped"
    positions = math.prod(g_shape[1:-1])  # views x height x width of one example
    if platform() == "cpu":
        small = positions <= 64 or (max(spec.strides) > 1 and positions <= 256)
        return "unrolled_im2col" if small and spec.groups == 1 else "unrolled"
    if not computes_bfloat16(device()):
        return "grouped_im2col"
    return "im2col" if w_shape[-2] >= 128 or max(spec.strides) > 1 else "sliced"


@functools.cache
def _weight_grad(w_shape: Shape, spec: Spec) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The weight gradient of one convolution, with its own batching rule."""

    @jax.custom_batching.custom_vmap
    def weight_grad(x: jax.Array, g: jax.Array) -> jax.Array:
        return _one(x, g, w_shape, spec)

    @weight_grad.def_vmap
    def rule(axis_size: int, in_batched: list[bool], x: jax.Array, g: jax.Array) -> tuple[jax.Array, bool]:
        # A cotangent (or input) may be unbatched; it is then the same for all examples.
        x = x if in_batched[0] else jnp.broadcast_to(x, (axis_size, *x.shape))
        g = g if in_batched[1] else jnp.broadcast_to(g, (axis_size, *g.shape))
        how = _choose(g.shape, w_shape, spec)
        if how == "unrolled":
            d = jnp.stack([_one(x[b], g[b], w_shape, spec) for b in range(axis_size)])
        elif how == "unrolled_im2col":
            parts = [_products(x[b : b + 1], g[b : b + 1], w_shape, spec, True) for b in range(axis_size)]
            d = jnp.concatenate(parts)
        elif how == "grouped":
            d = _grouped(x, g, w_shape, spec)
        else:
            d = _products(x, g, w_shape, spec, im2col=how == "im2col")
        return d, True

    return weight_grad


def _input_grad(w: jax.Array, g: jax.Array, x_shape: Shape, spec: Spec) -> jax.Array:
    """The input gradient; at stride 1 it is a forward convolution with flipped weights."""
    spatial = range(w.ndim - 2)
    if all(s == 1 for s in spec.strides) and spec.groups == 1:
        reach = [(k - 1) * d for k, d in zip(w.shape[:-2], spec.dilation, strict=True)]
        padding = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, spec.padding, strict=True))
        flipped = jnp.flip(w, tuple(spatial)).swapaxes(-1, -2)
        return _forward(g, flipped, spec._replace(padding=padding))
    zero = jnp.zeros(x_shape, g.dtype)
    (d,) = jax.linear_transpose(lambda x: _forward(x, w, spec), zero)(g)
    return d


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    """The convolution with the gradients of this module."""
    return _forward(x, w, spec)


def _conv_fwd(x: jax.Array, w: jax.Array, spec: Spec) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(the convolution, what its gradients need)."""
    return _forward(x, w, spec), (x, w)


def _conv_bwd(
    spec: Spec, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(input gradient, weight gradient)."""
    x, w = residuals
    return _input_grad(w, g, x.shape, spec), _weight_grad(w.shape, spec)(x, g)


_conv.defvjp(_conv_fwd, _conv_bwd)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """Replaces `jax.lax.conv_general_dilated` and has fast weight gradients per example.

    The rule of this module applies to channels-last convolutions of 1 to 3 spatial dimensions, as Flax writes them;
    they may be strided, dilated or grouped. All others (transposed convolutions, batch groups, other layouts) are
    passed to JAX unchanged.

    Args:
      lhs: inputs, [batch, *spatial, features].
      rhs: kernel, [*spatial, features / groups, out_features].
      others: as in `jax.lax.conv_general_dilated`.
    Returns:
      [batch, *spatial_out, out_features], of the dtype of the inputs.

    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> images, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 8))
    >>> conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout).shape
    (2, 5, 5, 8)
    """
    rank = lhs.ndim - 2
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # Flax: out_sharding=None
    ours = 1 <= rank <= 3 and lhs.dtype == rhs.dtype and not kwargs
    ours &= preferred_element_type in (None, lhs.dtype) and batch_group_count == 1
    ours &= lhs_dilation is None or all(d == 1 for d in lhs_dilation)
    if ours:
        given = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        plain = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _dimension_numbers(rank))
        ours = given == plain
    if not ours:
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count, precision, preferred_element_type, **kwargs,
        )  # fmt: skip
    dilation = tuple(rhs_dilation) if rhs_dilation is not None else (1,) * rank
    strides = tuple(window_strides)
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:-2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], reach, strides, padding)
    explicit = tuple((int(lo), int(hi)) for lo, hi in padding)
    return _conv(lhs, rhs, Spec(strides, explicit, dilation, feature_group_count, precision))
