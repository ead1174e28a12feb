"""Eight simulated CPU devices, set before JAX starts, and the fixtures that tests ask for by name."""

import contextlib
import gc
import os
import tempfile

os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "dpnb-tests")  # not the user's
os.environ["DPNB_CACHE"] = os.path.join(os.environ["XDG_CACHE_HOME"], "dpnb")
os.environ["DPNB_CACHE_GIB"] = "0"  # tests compute what they test; those of the cache ask for the fixture
# One cache of compiled programs for all tests and the processes that they start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # idle ones would spin beside two workers on two cores
# Most of the time of many tests is compilation, which level 0 halves; what is computed takes longer, but is little.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import jax
import pytest
import shared_runs

# Fixtures that train for half a minute or more: the tests that ask for them are slow, however short they are.
SLOW_FIXTURES = {"demo", "genuine", "swept"}


# Files that take a minute or more, so that no worker begins one when the others are done.
LONG = (
    "test_learn", "test_imagenet_notebooks", "test_finetune_notebooks", "test_studies", "test_distributed", "test_demo",
    "test_from_scratch", "test_site", "test_transfer", "test_two_pass", "test_clipping", "test_nf", "test_replay", "test_privacy",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    order = {f"{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def pytest_collection_finish():
    """Garbage is looked for a hundredth as often, and never among the modules: one sixth of the time, no more memory."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def float64():
    """JAX computes in float64 inside the test; two ways to the same number then agree to 1e-12."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def trace_for():
    """A function that has the rest of the test traced as for devices of a platform."""
    with contextlib.ExitStack() as stack:
        yield lambda platform: stack.enter_context(shared_runs.traced_for(platform))


@pytest.fixture
def strict_ranks():
    """Arrays of different rank never broadcast silently (the usual way to a wrong gradient)."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def disk_cache(tmp_path, monkeypatch):
    """An empty cache on disk, of this test alone; returns its folder."""
    monkeypatch.setenv("DPNB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DPNB_CACHE_GIB", "1")
    monkeypatch.setattr("dpnb.cache._warned", False)
    return tmp_path / "cache"


@pytest.fixture
def checked_once(monkeypatch):
    """Trainers that are alike are checked once, see `shared_runs.check_once`."""
    from dpnb.training import session

    monkeypatch.setattr(session, "check_trainer", shared_runs.check_once(session.check_trainer))
