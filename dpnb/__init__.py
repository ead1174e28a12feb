"""dpnb: differentially private image classification, reproduced in notebooks."""

import os
import pathlib


def use_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled programs between runs, so that only the first run of a shape compiles.

    Args:
      directory: default `$JAX_COMPILATION_CACHE_DIR`, else `~/.cache/dpnb`.
    """
    import jax

    directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", directory or str(pathlib.Path.home() / ".cache" / "dpnb"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
