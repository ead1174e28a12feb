"""How an operation meets `vmap`: example by example where that is faster."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def per_example(f: Callable) -> Callable:
    """`f` with a batching rule of its own: on CPU one call for each example, stacked.

    XLA:CPU batches weight gradients badly but runs the single ones at full speed, and it
    removes the stack again where each example is consumed on its own (as
    `dpnb.gradients.clipping` does).  Other backends keep the ordinary `vmap`.  The numbers agree
    to rounding.  `f` takes and returns pytrees of arrays and is not differentiated again.
    """

    @jax.custom_batching.custom_vmap
    def batched(*args):
        return f(*args)

    @batched.def_vmap
    def rule(axis_size, in_batched, *args):
        if jax.default_backend() == "cpu":
            # An unbatched argument is legal (the same for all examples).
            def pick(i):
                return jax.tree.map(lambda x, b: x[i] if b else x, list(args), list(in_batched))

            out = [f(*pick(i)) for i in range(axis_size)]
            out = jax.tree.map(lambda *xs: jnp.stack(xs), *out)
        else:
            in_axes = jax.tree.map(lambda b: 0 if b else None, tuple(in_batched))
            out = jax.vmap(f, in_axes, axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return batched
