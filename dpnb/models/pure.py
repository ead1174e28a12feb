"""Turns an NNX model into a pure function of its parameters."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx

from dpnb.models.weights.transfer import Frozen


def functional(model: nnx.Module) -> tuple[dict[str, Any], Callable[[Any, jax.Array], jax.Array]]:
    """Splits any NNX model into parameters and a pure function.

    Whatever is not an `nnx.Param` (running statistics, random streams) stays as it is now:
    its updates are dropped, since they would carry data past the clipping.

    Args:
      model: any NNX module whose call takes inputs [batch, ...].
    Returns:
      (params, apply): a nested dict of arrays, and `apply(params, inputs) -> outputs`.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, inputs):
        return nnx.merge(graph, params, rest, copy=True)(inputs)

    return nnx.to_pure_dict(params), apply


def jitted(model: nnx.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a jitted function (*arguments) -> call(model, *arguments), which gets a fresh copy of the model.

    Weights, frozen ones too, are arguments of its program, which would compile them as constants. What else the model
    holds is constant: a call may index by it or decide by it. The weights may lie on any devices.
    """
    graph, weights, rest = nnx.split(model, (nnx.Param, Frozen), ...)

    @jax.jit
    def program(weights, *arguments):
        return call(nnx.merge(graph, weights, rest, copy=True), *arguments)

    return functools.partial(program, jax.device_put(jax.device_get(weights)))


def structure(model: nnx.Module) -> Hashable | None:
    """Returns what a model computes with, beside its parameters: equal for models that differ in these alone.

    It is the model's classes and settings, with their types; objects among the settings must not be changed. None if
    that is not all: the model holds other variables, which `functional` makes constants of the program, or settings
    that cannot be hashed.
    """
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    found = graph, repr(graph)  # which tells 1 from 1.0 and True
    try:
        hash(found)
    except Exception:  # whatever a setting's own __hash__ raises
        return None
    return None if nnx.to_flat_state(rest) else found
