"""Results: records that describe themselves, tables and studies made of them, and their verification.

`dpnb.results.verification` needs JAX and is imported by its own name.
"""

from dpnb.results.consistency import LeftOut
from dpnb.results.records import finite, recompute_epsilon, record, statement
from dpnb.results.store import flatten, load, matching_records, one_per_seed, runs_of_cell, save
from dpnb.results.studies import (
    Difference,
    counts,
    difference,
    differences,
    scale,
    series,
    spent,
    study,
    summary,
    tidy,
)
from dpnb.results.tables import (
    excerpt,
    insert,
    markdown,
    possibility,
    published,
    row,
    spread,
    status,
    table,
    verdict,
)

__all__ = [
    "Difference", "LeftOut", "counts", "difference", "differences", "excerpt", "finite", "flatten", "insert", "load",
    "markdown", "matching_records", "one_per_seed", "possibility", "published", "recompute_epsilon", "record",
    "row", "runs_of_cell", "save", "scale", "series", "spent", "spread", "statement", "status", "study", "summary",
    "table", "tidy", "verdict",
]  # fmt: skip
