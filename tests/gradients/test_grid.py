"""Sums of integers: exact, the same in any order, and of a sensitivity without exception."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpnb.gradients import FORMS, clipped_grad

BITS = 18


def linear(w, x):
    """The gradient of one example is the example itself."""
    return jnp.vdot(w, x)


def sums(examples, clip_norm=1.0, **options):
    """The integers that the examples add up to, int64."""
    options = {"rescale_to_unit_norm": True, "grid_bits": BITS, **options}
    grad = clipped_grad(linear, clip_norm, **options)
    total, _ = jax.jit(grad)(jnp.zeros(examples.shape[1:]), examples)
    assert total.dtype == jnp.int32
    return np.asarray(total, np.int64)


def norm(integers) -> float:
    """Of exact integers: their sum of squares has no rounding."""
    return float(np.sqrt(float((integers.astype(object) ** 2).sum())))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip_norm", [1e-12, 1.0, 1e10])
def test_it_is_the_clipped_gradient_rounded_towards_zero(form, clip_norm):
    """Against float64, to one unit of rounding; 2^-13 below the clip norm where it is clipped."""
    x = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32) * np.float32(clip_norm)
    x[0] *= 1e-3  # not clipped
    expected = np.zeros(300)
    for row in x.astype(float):
        scaled = row / max(np.linalg.norm(row), clip_norm) * (1 - 2**-13) * 2**BITS
        expected += np.trunc(scaled)
    assert np.abs(sums(jnp.asarray(x), clip_norm, form=form) - expected).max() <= 5


def test_without_rescaling_the_unit_follows_the_clip_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32))
    grad = clipped_grad(linear, 0.25, grid_bits=BITS)
    assert grad.unit == 0.25 / 2**BITS and grad.sensitivity == 0.25
    assert np.array_equal(sums(x, 0.25, rescale_to_unit_norm=False), sums(x, 0.25))
    assert clipped_grad(linear, 0.25).unit == 1.0


HARD = {
    "equal": lambda n: np.ones(n),
    "rounds down": lambda n: np.full(n, 1.06**0.5),  # a running sum of squares loses 6 % of each
    "one large, many small": lambda n: np.r_[2.0**12, np.full(n - 1, 0.7)],
    "growing": lambda n: np.geomspace(1e-6, 1e6, n),
    "huge": lambda n: np.full(n, 1e18 / np.sqrt(n)),
    "tiny": lambda n: np.full(n, 1e-16),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("content", HARD)
def test_no_example_is_longer_than_the_sensitivity(form, content):
    """Three million parameters of whatever content: the exact norm of its integers is at most 2^bits."""
    n = 3_000_001
    x = HARD[content](n).astype(np.float32)
    for clip_norm in (1.0, 1e-12 if content == "tiny" else 100.0):
        total = sums(jnp.asarray(x)[None], clip_norm, form=form, grid_bits=20)
        assert np.sqrt(float(total @ total)) <= 2**20  # (below 2^63: exact)
        longest = np.linalg.norm(x.astype(float)) / clip_norm
        if longest > 10 and content != "equal":
            assert norm(total[:: n // 1000]) > 0


def test_floats_alone_would_not_keep_that_promise():
    """Why clipping on a grid aims 2^-13 lower: a plain float32 norm of such examples may be wrong by 1 %."""
    x = HARD["rounds down"](3_000_001).astype(np.float32)
    running = np.add.accumulate(np.square(x), dtype=np.float32)[-1]  # one after another, as a compiler may
    assert abs(np.sqrt(float(running)) / np.linalg.norm(x.astype(float)) - 1) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("backend_form", FORMS)
def test_the_sum_is_that_of_the_parts_to_the_bit(backend_form):
    """Neighbours: with and without any example, whatever else is there (NaN, infinity, 1e30), in any order."""
    x = np.random.default_rng(1).normal(size=(8, 500)).astype(np.float32)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, 1e30
    x = jnp.asarray(x)
    parts = [sums(x[i : i + 1], form=backend_form) for i in range(8)]
    whole = sums(x, form=backend_form)
    assert np.array_equal(whole, sum(parts)) and not any(parts[i].any() for i in (1, 2, 3))
    assert np.array_equal(whole, sums(x[::-1], form=backend_form))
    for i in range(8):
        without = sums(jnp.delete(x, i, axis=0), form=backend_form)
        assert norm(whole - without) <= 2**BITS


def test_sums_wrap_around():
    """Modulo 2^32, as the noise does: what is left is a function of the true sum."""
    x = jnp.ones((600, 1))
    total = sums(x, grid_bits=24)
    true = 600 * int(2**24 * (1 - 2**-13))
    assert true > 2**32 and (total[0] - true) % 2**32 == 0


def test_masked_examples_and_running_totals():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 30)).astype(np.float32))
    grad = clipped_grad(linear, 1.0, rescale_to_unit_norm=True, grid_bits=BITS)
    first, _ = grad(jnp.zeros(30), x, jnp.array([True, False, True, False]))
    both, _ = grad(jnp.zeros(30), x, jnp.array([False, True, False, True]), first)
    assert np.array_equal(both, sums(x)) and not np.array_equal(first, both)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_parameters_without_a_norm_are_refused(dtype):
    """Complex gradients had norm 0, and went through unclipped."""
    with pytest.raises(TypeError, match="parameters must be real floating numbers, got (complex64|int32)"):
        clipped_grad(lambda w, x: jnp.real((w * x).sum()), 1.0)(jnp.zeros(2, dtype), jnp.ones((1, 2), dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_integers_is_refused(form):
    """Its gradient would be zero, and the run one of noise alone."""
    with pytest.raises(TypeError):
        clipped_grad(lambda w, x: jnp.round(w @ x).astype(jnp.int32), 1.0, form=form)(
            jnp.zeros(2), jnp.ones((1, 2))
        )


@pytest.mark.parametrize("clip_norm", [1.1e18, 1e39, 1e300])
def test_a_clip_norm_beyond_float32_is_refused(clip_norm):
    """It gave NaN for every example."""
    with pytest.raises(ValueError, match="at most 1e.18, or inf"):
        clipped_grad(linear, clip_norm)
    total, _ = clipped_grad(linear, 1e18, rescale_to_unit_norm=True)(jnp.zeros(2), jnp.ones((1, 2)))
    assert np.isfinite(total).all()


@pytest.mark.parametrize("bits", [-1, 25])
def test_grids_that_float32_cannot_fill_are_refused(bits):
    with pytest.raises(ValueError, match="grid_bits must be 0 to 24"):
        clipped_grad(linear, 1.0, grid_bits=bits)
    with pytest.raises(ValueError, match="grid_bits needs a finite clip_norm"):
        clipped_grad(linear, float("inf"), grid_bits=20)
