"""Random bits from a seed, by a keyed cryptographic function: the same on every machine and in every version.

Sampling and noise are drawn from here. A stream is SHAKE-256 (FIPS 202, Python's hashlib) of the seed and a label.
Without the seed it cannot be told from true random bits, unless the function is broken. It depends on no setting of
JAX and no version of NumPy.
"""

import hashlib
import json
import secrets

SEED_BITS = 256  # length of a secret seed


def random_bytes(n: int, seed: int, *label: int | str) -> bytes:
    """The first n bytes of the stream of this seed and label. Streams of different labels are independent.

    >>> random_bytes(4, 7, "noise", 0).hex()
    '7cdad284'
    """
    return hashlib.shake_256(json.dumps([int(seed), *label]).encode()).digest(n)


def secret_seed() -> int:
    """A new seed of `SEED_BITS` random bits from the operating system.

    >>> secret_seed() < 2**SEED_BITS
    True
    """
    return secrets.randbits(SEED_BITS)


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of `SEED_BITS` bits for one purpose; another purpose gives an independent seed.

    If two releases share their noise but not their settings, their difference is a function of the data without
    noise. Deriving the seed from the settings makes the releases independent, as composition requires. A derived seed
    is as secret as `seed`, and reveals nothing about other derived seeds or about `seed`.

    >>> derived_seed(7, "noise") == derived_seed(7, "noise") != derived_seed(7, "views")
    True
    """
    return int.from_bytes(random_bytes(SEED_BITS // 8, seed, "seed", purpose))
