"""A convolution whose weight gradient knows how to be taken per example.

`vmap(grad(loss))` over examples turns the weight gradient of a convolution into a
grouped convolution, which every backend runs slowly.  Here only that one operation
gets its own batching rule (`jax.custom_batching.custom_vmap`); user code stays
`vmap(grad(loss))` and the numbers stay exact.  Pass `conv_general_dilated` to any
Flax convolution: `nnx.Conv(..., conv_general_dilated=dpnb.gradients.convolution.conv_general_dilated)`.

Which formulation is fastest differs by backend and by shape, so the rule is switchable:

===================  =============================================================
``unrolled``         one ordinary weight-gradient convolution for each example
``unrolled_im2col``  all kernel offsets side by side, one matrix product for each example
``sliced``           for each kernel offset, one batched matrix product over examples
``im2col``           all offsets side by side, a single batched matrix product
``grouped``          what JAX does without this module: one grouped convolution
``auto``             CPU: by shape, as measured by benchmarks/clipped_gradient.py;
                     elsewhere ``sliced``, not measured yet
===================  =============================================================

Reverse-over-reverse differentiation is not supported (the gradient of a gradient).
"""

import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FORMULATIONS = ("auto", "unrolled", "unrolled_im2col", "sliced", "im2col", "grouped")
_formulation = "auto"


class Spec(NamedTuple):
    """The static part of a convolution; padding as explicit (low, high) pairs."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: object = None


@contextlib.contextmanager
def formulation(name: str):
    """Choose the weight-gradient formulation for everything traced inside the block.

    Raises:
      ValueError: the name is not one of `FORMULATIONS`.
    """
    if name not in FORMULATIONS:
        raise ValueError(f"formulation must be one of {FORMULATIONS}, got {name!r}")
    global _formulation
    before, _formulation = _formulation, name
    try:
        yield
    finally:
        _formulation = before


def _dimension_numbers(rank: int):
    spatial = "DHW"[3 - rank :]
    return ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")


def _forward(x, w, spec: Spec):
    return lax.conv_general_dilated(
        x, w, spec.strides, spec.padding, rhs_dilation=spec.dilation,
        dimension_numbers=_dimension_numbers(len(spec.strides)),
        feature_group_count=spec.groups, precision=spec.precision,
    )  # fmt: skip


def _kernel_slices(x, kernel: tuple[int, ...], out: tuple[int, ...], spec: Spec):
    """For each kernel offset, the inputs it meets: [examples, views, *out, channels] each."""
    lead = x.ndim - len(kernel) - 1
    none = [(0, 0, 0)] * lead
    # lax.pad also crops where a padding is negative.
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


def _products(x, g, w_shape, spec: Spec, im2col: bool):
    """Per-example weight gradient as batched matrix products.

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


def _one(x, g, w_shape, spec: Spec):
    """The ordinary weight gradient, summed over everything in the batch."""
    zero = jnp.zeros(w_shape, g.dtype)
    return jax.linear_transpose(lambda w: _forward(x, w, spec), zero)(g)[0]


def _choose(x_shape, g_shape, w_shape, spec: Spec) -> str:
    """The formulation for this backend and shape."""
    if _formulation != "auto":
        return _formulation
    positions = math.prod(g_shape[1:-1])  # views x height x width of one example
    if jax.default_backend() == "cpu":
        small = positions <= 64 or (max(spec.strides) > 1 and positions <= 256)
        return "unrolled_im2col" if small and spec.groups == 1 else "unrolled"
    return "sliced"


@functools.cache
def _weight_grad(w_shape, spec: Spec):
    """The weight gradient of one convolution, with its own rule under vmap."""

    @jax.custom_batching.custom_vmap
    def weight_grad(x, g):
        return _one(x, g, w_shape, spec)

    @weight_grad.def_vmap
    def rule(axis_size, in_batched, x, g):
        # An unbatched cotangent (or input) is legal: it is the same for all examples.
        x = x if in_batched[0] else jnp.broadcast_to(x, (axis_size, *x.shape))
        g = g if in_batched[1] else jnp.broadcast_to(g, (axis_size, *g.shape))
        how = _choose(x.shape, g.shape, w_shape, spec)
        if how == "unrolled":
            d = jnp.stack([_one(x[b], g[b], w_shape, spec) for b in range(axis_size)])
        elif how == "unrolled_im2col":
            d = [_products(x[b : b + 1], g[b : b + 1], w_shape, spec, True) for b in range(axis_size)]
            d = jnp.concatenate(d)
        elif how == "grouped":
            d = jax.vmap(lambda x, g: _one(x, g, w_shape, spec))(x, g)
        else:
            d = _products(x, g, w_shape, spec, im2col=how == "im2col")
        return d, True

    return weight_grad


def _input_grad(w, g, x_shape, spec: Spec):
    """Input gradient; at stride 1 a plain forward convolution with flipped weights."""
    spatial = range(w.ndim - 2)
    if all(s == 1 for s in spec.strides) and spec.groups == 1:
        reach = [(k - 1) * d for k, d in zip(w.shape[:-2], spec.dilation, strict=True)]
        padding = tuple((r - lo, r - hi) for r, (lo, hi) in zip(reach, spec.padding, strict=True))
        flipped = jnp.flip(w, tuple(spatial)).swapaxes(-1, -2)
        return _forward(g, flipped, spec._replace(padding=padding))
    zero = jnp.zeros(x_shape, g.dtype)
    return jax.linear_transpose(lambda x: _forward(x, w, spec), zero)(g)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, w, spec: Spec):
    return _forward(x, w, spec)


def _conv_fwd(x, w, spec):
    return _forward(x, w, spec), (x, w)


def _conv_bwd(spec, residuals, g):
    x, w = residuals
    return _input_grad(w, g, x.shape, spec), _weight_grad(w.shape, spec)(x, g)


_conv.defvjp(_conv_fwd, _conv_bwd)


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
    **kwargs,
):
    """Drop-in for `jax.lax.conv_general_dilated`, with fast per-example weight gradients.

    Channels-last convolutions of 1 to 3 spatial dimensions (what Flax writes), strided,
    dilated or grouped, take the rule of this module; anything else (transposed
    convolutions, batch groups, other layouts) is passed to JAX unchanged.

    Args:
      lhs: inputs, [batch, *spatial, features].
      rhs: kernel, [*spatial, features / groups, out_features].
      others: as in `jax.lax.conv_general_dilated`.
    Returns:
      [batch, *spatial_out, out_features], of the inputs' dtype.
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
    padding = tuple((int(lo), int(hi)) for lo, hi in padding)
    return _conv(lhs, rhs, Spec(strides, padding, dilation, feature_group_count, precision))
