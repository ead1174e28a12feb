"""Samplers, exact noise, accountants, calibration, the ledger and the privacy statement.

Only `dpnb.privacy.noise` needs JAX; it is imported by its own name. dp-accounting is imported when the first epsilon
is computed, so that a machine without it can train.
"""

from dpnb.privacy.accounting import (
    ACCOUNTANTS,
    DEFAULT_ACCOUNTANT,
    PLD_INTERVAL,
    DeltaTooSmall,
    epsilon,
    epsilon_curve,
    find_accountant,
)
from dpnb.privacy.calibration import MOST_STEPS, affordable_steps, calibrate_noise, calibrate_steps
from dpnb.privacy.ledger import BudgetExceeded, Ledger, LedgerError, LedgerLocked, SharedNoise
from dpnb.privacy.mechanism import (
    LARGEST_CLIP_NORM,
    NEIGHBOURS,
    SAMPLERS,
    SMALLEST_CLIP_NORM,
    Mechanism,
    MissingAccountant,
    PrivacyBudget,
    compose,
    counts_from_json,
    events_from_json,
    warn_if_delta_is_large,
)
from dpnb.privacy.randomness import derived_seed
from dpnb.privacy.sampling import PoissonSampler, Sampler, ShuffleSampler, physical_batches
from dpnb.privacy.statement import privacy_statement

__all__ = [
    "ACCOUNTANTS", "DEFAULT_ACCOUNTANT", "LARGEST_CLIP_NORM", "MOST_STEPS", "NEIGHBOURS", "PLD_INTERVAL",
    "SAMPLERS", "SMALLEST_CLIP_NORM", "BudgetExceeded", "DeltaTooSmall", "Ledger", "LedgerError", "LedgerLocked",
    "Mechanism", "MissingAccountant", "PoissonSampler", "PrivacyBudget", "Sampler", "SharedNoise",
    "ShuffleSampler", "affordable_steps", "calibrate_noise", "calibrate_steps", "compose", "counts_from_json",
    "derived_seed", "epsilon", "epsilon_curve", "events_from_json", "find_accountant", "physical_batches",
    "privacy_statement", "warn_if_delta_is_large",
]  # fmt: skip
