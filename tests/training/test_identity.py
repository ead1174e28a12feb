"""Two models that compute different things are two: wherever their constants hide."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dpnb.training.identity import computation


def model(apply):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(12, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return apply(self.layer(x.reshape(len(x), -1)))

    return Net()


def backward(c):
    @jax.custom_vjp
    def f(x):
        return x

    f.defvjp(lambda x: (x, None), lambda _, g: (g * c,))
    return f


HIDING = {
    "plain": lambda c: lambda x: x * c,
    "jit": lambda c: jax.jit(lambda x: x * c),
    "checkpoint": lambda c: jax.checkpoint(lambda x: x * c),
    "scan": lambda c: lambda x: jax.lax.scan(lambda carry, _: (carry * c, None), x, None, length=2)[0],
    "backward rule": backward,
}


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
def test_constants_count_wherever_they_are(hide):
    """One with other constants must not pass for a free replay of the first."""
    one, same, other = (computation(model(hide(jnp.full(3, c))), None, (2, 2, 3)) for c in (1.5, 1.5, -3.0))
    assert one == same != other
