"""Strategies of Hypothesis: what people write, and what broken disks leave of a file."""

import functools
import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples in every run.
deterministic = functools.partial(
    settings, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def broken(whole: bytes):
    """Strategy: a file cut, with bits flipped, with a hole of zeros, empty, or other content."""
    n = len(whole)

    def flip(places):
        changed = bytearray(whole)
        for byte, bit in places:
            changed[byte % n] ^= 1 << bit
        return bytes(changed)

    def hole(where):
        start, length = where
        return whole[:start] + bytes(min(length, n - start)) + whole[start + length :]

    place = st.integers(0, n - 1)
    return st.one_of(
        place.map(lambda end: whole[:end]),
        st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=3).map(flip),
        st.tuples(place, st.integers(1, 512)).map(hole),
        st.binary(max_size=50),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.just(whole + whole),
    )


def other_values(value):
    """Strategy: a JSON value with one item, at any depth, replaced by another value or left out."""

    def changed(value, path, new):
        if not path or not isinstance(value, (dict, list)) or not value:
            return new
        keys = [*value] if isinstance(value, dict) else list(range(len(value)))
        key = keys[path[0] % len(keys)]
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = changed(copy[key], path[1:], new)
        return copy

    paths = st.lists(st.integers(0, 60), min_size=1, max_size=3)
    odd = JSON | st.sampled_from([10**400, -1, 0, 2**63, 1e308, "", [], {}])
    return st.tuples(paths, odd).map(lambda given: changed(value, *given))
