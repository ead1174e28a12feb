"""Batching rules for `vmap` that go example by example if that is faster."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpnb.gradients.platform import platform


def per_example(f: Callable[..., Any]) -> Callable[..., Any]:
    """Gives `f` a batching rule that, on CPU, calls `f` once per example and stacks the results.

    XLA:CPU is slow at batched weight gradients but runs single ones at full speed. It also removes the stack again if
    each example is consumed on its own, as in `dpnb.gradients.clipping`. Other backends keep the ordinary `vmap`. The
    numbers agree up to rounding.

    Args:
      f: function of pytrees of arrays that returns one. It cannot be differentiated again.

    >>> square = per_example(lambda x: x * x)
    >>> print(jax.vmap(square)(jnp.arange(3.0)))
    [0. 1. 4.]
    """

    @jax.custom_batching.custom_vmap
    def batched(*args: Any) -> Any:
        return f(*args)

    @batched.def_vmap
    def rule(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        if platform() == "cpu":
            # An argument may be unbatched; it is then the same for all examples.
            def pick(i: int) -> list[Any]:
                return jax.tree.map(lambda x, b: x[i] if b else x, list(args), list(in_batched))

            out = [f(*pick(i)) for i in range(axis_size)]
            out = jax.tree.map(lambda *xs: jnp.stack(xs), *out)
        else:
            in_axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
            out = jax.vmap(f, in_axes, axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return batched
