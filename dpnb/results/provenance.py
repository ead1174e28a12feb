"""The provenance of a result: versions, git revision, memory."""

import pathlib
import subprocess
import sys

from dpnb import cache, folders

PACKAGES = ("dpnb", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "dp-accounting", "numpy")


def peak_memory_mib() -> int | None:
    """Returns the most host memory that this process has held so far, in MiB; None if unavailable."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(kib / 1024)


def versions() -> dict[str, str]:
    """Returns {package: version} of the packages that a result depends on."""
    return {name: version or "not installed" for name, version in cache.versions(*PACKAGES).items()}


def git_revision() -> str:
    """Returns the revision of this checkout, with "+" if dpnb's folder is changed; "" outside a checkout."""
    if not (folders.ROOT / ".git").exists():  # an installed package may lie in the checkout of something else
        return ""
    here = pathlib.Path(__file__).parents[1]

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
