"""Derives all seeds, from the one that an experiment names to the keys that one update draws from.

    run_seed        the experiment's seed, or a secret one of 256 bits, kept in the run's private folder
      derived_seed    with the fingerprint of experiment, data, own model and optimizer, and public weights:
                      two releases never share their noise, unless they are the same to the bit
        derived_seed    with the name of a stream (`stream_name`): other settings may round differently
          random_bytes    SHAKE-256, labelled: Poisson samples and noise (`dpnb.privacy`)
          root_key        JAX's generator: views of the images (`step_key`)
        derived_seed    with "initial parameters"
          initial_rngs    initial parameters

(`derived_seed` and `random_bytes` are in `dpnb.privacy.randomness`.)
"""

import hashlib
import json
import operator
import pathlib
import secrets

import jax
import numpy as np
from flax import nnx

from dpnb.files import write_atomic
from dpnb.privacy.randomness import random_bytes, secret_seed
from dpnb.training.hosts import check_same


def run_seed(directory: pathlib.Path, seed: int | None) -> tuple[int, str]:
    """Returns (seed, label): the given seed, or a secret one of 256 bits kept in `directory/seed.secret`.

    Anyone who knows the seed knows the noise, so a secret one appears in no record. The label may appear:
    it tells runs of different seeds apart, so that a new secret is never taken for a replay.

    Raises:
      ValueError: the file is damaged.
    """
    if seed is not None:
        return seed, f"seed {seed}"
    file = directory / "seed.secret"
    if not file.exists():
        drawn = {"seed": secret_seed(), "label": secrets.token_hex(8)}
        write_atomic(file, json.dumps(drawn), mode=0o600)
    try:
        kept = json.loads(file.read_bytes())
        return operator.index(kept["seed"]), f"secret {kept['label']}"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must hold the run's secret seed, but is damaged ({type(error).__name__}); restore a copy of it, or "
            "choose another directory"
        ) from None


def stream_name(before: str, *why: str) -> str:
    """Names the stream that follows another one ("" for the first), given why that one was left."""
    return hashlib.sha256(json.dumps([before, *why]).encode()).hexdigest()


def root_key(seed: int) -> np.ndarray:
    """Returns numpy uint32 [2], from which JAX draws augmentation and initial parameters.

    It does not reveal the seed.
    """
    return np.frombuffer(random_bytes(8, seed, "jax"), "<u4").astype(np.uint32)


def step_key(root: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the augmentation key of one update; no two updates share one."""
    return jax.random.fold_in(wrapped(root), step)


def wrapped(root: jax.Array) -> jax.Array:
    """Returns a root key as JAX's typed key, always of the threefry generator, whatever JAX's default is."""
    return jax.random.wrap_key_data(root, impl="threefry2x32")


def initial_rngs(seed: int) -> nnx.Rngs:
    """Returns the random stream of a network's initial parameters; no update draws from it."""
    return nnx.Rngs(params=jax.random.fold_in(wrapped(root_key(seed)), 2**31))


def assert_same_seed(seed: int) -> None:
    """Checks that all processes have the same seed and so, as it is derived from them, experiment and data.

    Raises:
      ValueError: some differ from the first; raised on all of them, so that none waits for another.
    """
    remedy = "give them one directory that all see, and the same files"
    check_same("seed, experiment and data", str(seed), remedy)
