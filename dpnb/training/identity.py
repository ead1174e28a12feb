"""Hashes of what code, model and optimizer compute, the same in every process."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Literal

from dpnb.models import functional


@functools.cache
def code() -> str:
    """Returns the SHA-256 (hex) of dpnb's own source files: another version is another computation."""
    digest = hashlib.sha256()
    here = pathlib.Path(__file__).parents[1]
    for file in sorted(here.rglob("*.py")):
        digest.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return digest.hexdigest()


def computation(
    model: nnx.Module | None, optimizer: optax.GradientTransformation | None, image_shape: tuple[int, ...]
) -> str:
    """Returns the SHA-256 (hex) of the traced programs and all their constants, initial parameters included.

    Printed objects do not serve: they show memory addresses, which differ from process to process, and
    show neither parameters nor learning rates, which make another release.

    Args:
      model: any NNX model, or None.
      optimizer: any Optax transformation, or None.
      image_shape: (h, w, c) of one image.
    """
    digest, programs, params = hashlib.sha256(), [], {}
    if model is not None:
        params, apply = functional(model)

        def loss(params, images):  # with its backward rules, which may hold constants of their own
            return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, apply(params, images)))

        programs.append(jax.make_jaxpr(jax.value_and_grad(loss))(params, jnp.zeros((1, *image_shape))))
    if optimizer is not None:
        like = params or {"any": jnp.zeros(3)}
        programs.append(jax.make_jaxpr(optimizer.init)(like))
        programs.append(jax.make_jaxpr(optimizer.update)(like, optimizer.init(like), like))
    for program in programs:
        digest.update(re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)).encode())
    for x in jax.tree.leaves([params, *[[*constants(p.jaxpr, p.consts)] for p in programs]]):
        if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        digest.update(f"{x.dtype} {x.shape}".encode() + x.tobytes())
    return digest.hexdigest()


def constants(jaxpr, own=()) -> Iterator[Any]:
    """Yields all constants of a traced program, those of its inner programs (`jit`, `scan` ...) included.

    Args:
      jaxpr: the program.
      own: its own constants.
    """
    yield from own
    for equation in jaxpr.eqns:
        yield from (v.val for v in equation.invars if isinstance(v, Literal) and np.ndim(v.val))
        inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        for program in inner:
            if hasattr(program, "jaxpr"):
                yield from constants(program.jaxpr, program.consts)
            elif hasattr(program, "eqns"):
                yield from constants(program)
