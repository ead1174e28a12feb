"""Random bits from a seed: a keyed cryptographic function, the same on every machine and in every version.

Sampling and noise are drawn from here. SHAKE-256 (FIPS 202, Python's hashlib) of the seed and a label is a
stream that nobody who lacks the seed can tell from true random bits without breaking the function; and no
setting of JAX or version of NumPy has a say in it.
"""

import hashlib
import json
import secrets

SEED_BITS = 256  # of a secret seed


def random_bytes(n: int, seed: int, *label: int | str) -> bytes:
    """The first n bytes of the stream of this seed and label; streams of other labels are independent.

    >>> random_bytes(4, 7, "noise", 0).hex()
    '7cdad284'
    """
    return hashlib.shake_256(json.dumps([int(seed), *label]).encode()).digest(n)


def secret_seed() -> int:
    """A seed of `SEED_BITS` bits from the operating system."""
    return secrets.randbits(SEED_BITS)


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of `SEED_BITS` bits for one purpose: afresh wherever the purpose differs.

    Two releases that share the noise but not the settings differ by a bare function of the data; deriving
    the seed from both makes them independent, as composition needs. It is as secret as `seed` is, and one
    derived seed tells nothing about another one or about `seed`.
    """
    return int.from_bytes(random_bytes(SEED_BITS // 8, seed, "seed", purpose))
