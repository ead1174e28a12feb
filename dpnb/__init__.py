"""dpnb: differentially private image classification, reproduced in notebooks.

What most programs need has its name here; everything else lies in the packages, from the ground up: `privacy`,
`gradients`, `data`, `models`, `experiments`, `training`, `results`. Importing dpnb is cheap: each name is loaded
when it is first used.
"""

import os
from typing import TYPE_CHECKING

from dpnb import lazy

if TYPE_CHECKING:
    from dpnb.data import Dataset, Split, load
    from dpnb.experiments import Experiment
    from dpnb.gradients import clipped_grad
    from dpnb.models import functional
    from dpnb.privacy import Ledger, Mechanism, PrivacyBudget, calibrate_noise, epsilon, privacy_statement
    from dpnb.training import Run, make_trainer, train

__all__ = [
    "Dataset", "Experiment", "Ledger", "Mechanism", "PrivacyBudget", "Run", "Split", "calibrate_noise",
    "clipped_grad", "epsilon", "functional", "load", "make_trainer", "privacy_statement", "train",
    "use_compilation_cache",
]  # fmt: skip

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        **dict.fromkeys(("Dataset", "Split", "load"), "dpnb.data"),
        "Experiment": "dpnb.experiments",
        "clipped_grad": "dpnb.gradients",
        "functional": "dpnb.models",
        **dict.fromkeys(("Ledger", "Mechanism", "PrivacyBudget"), "dpnb.privacy"),
        **dict.fromkeys(("calibrate_noise", "epsilon", "privacy_statement"), "dpnb.privacy"),
        **dict.fromkeys(("Run", "make_trainer", "train"), "dpnb.training"),
    },
)


def use_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled programs between runs, so that only the first run of a shape compiles.

    Args:
      directory: default `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/dpnb`. Programs that compile in less than
        0.2 seconds are not kept, unless `$JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says otherwise.
    """
    import jax

    from dpnb import cache

    jax.config.update("jax_compilation_cache_dir", directory or str(cache.compiled_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
