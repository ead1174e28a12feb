"""Checks that a model treats every example on its own, by its behaviour and not by layer names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpnb.models.pure import jitted

# The state that could carry examples from call to call.
_carried = nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate))


class MixesExamples(ValueError):
    """A model's output for one example depends on the other examples of its batch."""


class DrawsRandomNumbers(ValueError):
    """A call of a model draws random numbers, as dropout does."""


def check_independent(model: nnx.Module, inputs: jax.Array, *, tolerance: float = 1e-5) -> None:
    """Replaces one example at a time, and checks that the outputs of all others stay the same.

    In training mode and in evaluation mode (`model.train()`, `model.eval()`), every example j is
    replaced once by other content and once (floating inputs) by NaN, which reveals even the
    faintest mixing.  A call must also leave the model's state as it was, since running
    statistics carry one batch into the next.  Random streams and sown intermediates may
    change: they depend on no example, or end with the call.  `model` itself is not changed.

    A model that passes computes the same inside `dpnb.gradients.clipping.clipped_grad`, which calls it
    on the views of a single example, as in evaluation, which calls it on whole batches.

    Args:
      model: any NNX module whose call takes inputs [n, ...] and returns a pytree of [n, ...].
      inputs: [n, ...], floating or integer, n >= 2 examples that differ; a handful will do.
      tolerance: how far an output may move, relative to the largest output.
    Raises:
      MixesExamples: output i changed with example j, or the call changed the model's state.
      ValueError: fewer than two examples, all examples equal, or outputs that are not
        finite to begin with.

    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (3, 8))
    >>> check_independent(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), x)
    >>> check_independent(nnx.BatchNorm(8, rngs=nnx.Rngs(0)), x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dpnb.models.checks.MixesExamples: a call must treat every example on its own, but ...
    """
    inputs = jnp.asarray(inputs)
    if len(inputs) < 2 or bool((inputs == inputs[:1]).all()):
        raise ValueError(
            f"inputs must hold at least two examples that differ, got shape {inputs.shape}; "
            "random inputs will do"
        )
    checked = set()
    for mode in ("train", "eval"):
        copy = nnx.clone(model)
        getattr(copy, mode)()
        call = _functional(copy)
        program = call.func.lower(*call.args, inputs).as_text()
        if program not in checked:  # of most networks both modes are the same program
            checked.add(program)
            _check(copy, call, inputs, mode, tolerance)


def check_deterministic(model: nnx.Module, inputs: jax.Array) -> None:
    """Checks that a call of the model, in the mode in which it is, draws nothing from a random stream.

    `dpnb.models.functional` keeps random streams as they are, so that dropout would drop the same numbers in every
    update, and in evaluation too. `model` itself is not changed.

    Raises:
      DrawsRandomNumbers: it does.

    >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
    >>> check_deterministic(model, jnp.ones((2, 3)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dpnb.models.checks.DrawsRandomNumbers: a call must draw no random numbers, but ...
    >>> model.eval()
    >>> check_deterministic(model, jnp.ones((2, 3)))
    """
    call = _functional(model, nnx.RngCount)
    before = nnx.to_pure_dict(nnx.state(model, nnx.RngCount))
    if not before and not jax.eval_shape(call, inputs)[1]:
        return  # no random stream, before or after
    if changed := _changed(before, call(inputs)[1]):
        raise DrawsRandomNumbers(
            f"a call must draw no random numbers, but it moved the random stream {changed}; in training they would be "
            "the same in every update: leave out dropout and the like, or switch them off with model.eval()"
        )


def _check(model, call, inputs, mode, tolerance):
    before = nnx.to_pure_dict(nnx.state(model, _carried))
    outputs, after = call(inputs)
    n, leaves = len(inputs), jax.tree.leaves(outputs)
    if any(leaf.ndim == 0 or leaf.shape[0] != n for leaf in leaves):
        raise MixesExamples(
            f"outputs must keep the examples axis: {n} examples came in and shapes "
            f"{[leaf.shape for leaf in leaves]} out; do not sum or average over the batch"
        )
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ValueError(f"outputs must be finite before any example is replaced, not so in {mode} mode")
    for j in range(n):
        for content in _replacements(inputs, j):
            moved, _ = call(inputs.at[j].set(content))
            i = _first_moved(leaves, jax.tree.leaves(moved), j, tolerance)
            if i is not None:
                raise MixesExamples(
                    "a call must treat every example on its own, but in "
                    f"{mode} mode the output of example {i} moved when example {j} was replaced; use a "
                    "norm that looks at one example only (group norm, layer norm) instead of batch norm"
                )
    if changed := _changed(before, after):
        raise MixesExamples(
            f"a call must leave the model's state as it was, but in {mode} mode it changed "
            f"{changed}; running statistics carry one batch into the next, "
            "use group norm or layer norm"
        )


def _functional(model, returned=_carried):
    """Returns a pure function `(inputs) -> (outputs, the returned part of the state after the call)`."""

    def call(fresh, inputs):  # with the same random numbers every time
        outputs = fresh(inputs)
        return outputs, nnx.to_pure_dict(nnx.state(fresh, returned))

    return jitted(model, call)


def _replacements(inputs, j):
    """Returns what to put in place of example j."""
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        return [-2 * inputs[j] + 1, jnp.full_like(inputs[j], jnp.nan)]
    # Token numbers or bytes: use a value that occurs, so as to stay inside their range.
    return [x for x in inputs if bool((x != inputs[j]).any())][:1]


def _first_moved(before, after, j, tolerance):
    for a, b in zip(before, after, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        allowed = tolerance * np.abs(a).max(initial=0.0)
        still = (np.abs(a - b) <= allowed).reshape(len(a), -1).all(1)  # NaN is not still
        still[j] = True
        if not still.all():
            return int(np.argmin(still))
    return None


def _changed(before, after) -> str:
    """Returns the names of the leaves that differ, "" if none does."""

    def flat(tree):
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

    before, after = flat(before), flat(after)
    names = before.keys() | after.keys()
    same = {n for n in before.keys() & after.keys() if np.array_equal(before[n], after[n], equal_nan=True)}
    return ", ".join(sorted(names - same))
