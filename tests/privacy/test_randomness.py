"""Random bits: pinned for ever, as replays and published records rest on them; fresh for every purpose."""

import hashlib
import json

import numpy as np

from dpnb.privacy import derived_seed
from dpnb.privacy.randomness import random_bytes, secret_seed


def test_derived_seeds_are_fresh_where_anything_differs():
    seeds = {derived_seed(seed, name) for seed in (0, 1, 11, 2**62) for name in ("a", "b", "1 a", "")}
    assert len(seeds) == 16 and all(2**200 < s < 2**256 for s in seeds)
    assert derived_seed(0, "a") == derived_seed(np.int64(0), "a")


def test_streams_are_pinned():
    """A changed derivation would turn every repeated step into another release."""
    assert random_bytes(5, 7, "noise", 0) == hashlib.shake_256(b'[7, "noise", 0]').digest(5)
    assert derived_seed(7, "run") == int.from_bytes(hashlib.shake_256(b'[7, "seed", "run"]').digest(32))


def test_labels_cannot_be_confused():
    labels = [(1, 2), (12,), ("1", 2), ("1, 2",), (1, "2"), (1, 2, 0), ("a", "b"), ("a, b",), ('a", "b',)]
    assert len({random_bytes(16, 0, *label) for label in labels}) == len(labels)
    assert random_bytes(16, 1, 2) != random_bytes(16, 12) and json.dumps(1) == "1"


def test_a_secret_seed_has_256_bits():
    """False alarm: 2^-64 for the size, none for being new."""
    seeds = [secret_seed() for _ in range(20)]
    assert len(set(seeds)) == 20 and max(seeds).bit_length() > 192 and max(seeds) < 2**256
