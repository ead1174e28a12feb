"""Layers that treat the views of all examples as one batch under `vmap`.

`vmap` over examples gives every activation one more axis, [examples, views, height, width, channels]. Convolutions
merge the first two for themselves, but compilers for accelerators lay out what lies between them with five axes, and
copy back and forth. The functions of this module have batching rules that merge them as well, so that the program is that
of one flat batch. User code remains `vmap(grad(loss))`, and the numbers remain the same up to rounding; only gradients of
parameters are per example.

What is merged must treat every view on its own, like any layer of a network for private training
(`dpnb.models.check_independent` finds out).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def merged(f: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `f(shared, *views)` a batching rule that merges the axis of the examples with that of the views.

    Args:
      f: function of `shared`, any pytree that is the same for all views, and of pytrees of arrays [views, ...]; it
        treats every view on its own, and returns a pytree of arrays [views, ...].
    Returns:
      The same function; it cannot be differentiated in reverse. If `shared` is batched, too, the rule is that of `vmap`.

    >>> double = merged(lambda factor, x: factor * x)
    >>> print(jax.vmap(double, (None, 0))(2.0, jnp.arange(4.0).reshape(2, 2)))
    [[0. 2.]
     [4. 6.]]
    """

    @jax.custom_batching.custom_vmap
    def call(shared: Any, *views: Any) -> Any:
        return f(shared, *views)

    @call.def_vmap
    def rule(size: int, in_batched: list[Any], shared: Any, *views: Any) -> tuple[Any, Any]:
        def merge(x: jax.Array, batched: bool) -> jax.Array:
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        if any(jax.tree.leaves(in_batched[0])):
            in_axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
            out = jax.vmap(f, in_axes)(shared, *views)
        else:
            out = call(shared, *jax.tree.map(merge, list(views), list(in_batched[1:])))
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def per_view(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Gives `f(*views)`, a layer without parameters, and its gradient the batching rule of `merged`.

    >>> relu = per_view(jax.nn.relu)
    >>> print(jax.vmap(jax.grad(lambda x: relu(x).sum()))(jnp.array([[-1.0], [2.0]])))
    [[0.]
     [1.]]
    """
    forward = merged(lambda _, *views: f(*views))
    backward = merged(lambda _, g, *views: jax.vjp(f, *views)[1](g))

    @jax.custom_vjp
    def layer(*views: jax.Array) -> jax.Array:
        return forward((), *views)

    layer.defvjp(lambda *views: (forward((), *views), views), lambda views, g: backward((), g, *views))
    return layer


def wide(x: jax.Array) -> jax.Array:
    """Returns x in the dtype of sums, at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


add = per_view(jnp.add)
_sum_of_two = merged(lambda _, x, y: x + y)
_sum_per_channel = merged(lambda _, x: wide(x).sum(tuple(range(1, x.ndim - 1))))
_inner_product = merged(lambda _, x, y: (wide(x) * wide(y)).sum(tuple(range(1, x.ndim))))
_times = merged(lambda factor, x: x * factor.astype(x.dtype))
_plus = merged(lambda bias, x: x + jnp.expand_dims(bias.astype(x.dtype), tuple(range(x.ndim - 1))))


@jax.custom_vjp
def fork(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns x twice, for two paths of a network that begin there."""
    return x, x


fork.defvjp(lambda x: ((x, x), None), lambda _, g: (_sum_of_two((), *g),))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds `bias` [channels], cast to the dtype of x, to x [views, *spatial, channels]."""
    return _plus(bias, x)


add_bias.defvjp(
    lambda x, bias: (_plus(bias, x), bias),
    lambda bias, g: (g, _sum_per_channel((), g).sum(0).astype(bias.dtype)),
)


@jax.custom_vjp
def multiply(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies x [views, ...] by one number, cast to the dtype of x, that may be learnt."""
    return _times(factor, x)


def _multiply_bwd(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, factor = kept
    return _times(factor, g), _inner_product((), g, x).sum(0).astype(factor.dtype)


multiply.defvjp(lambda x, factor: (_times(factor, x), (x, factor)), _multiply_bwd)
