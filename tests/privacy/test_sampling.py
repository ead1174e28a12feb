"""The distribution of a batch. Seeds are fixed: nothing here fails by chance."""

import itertools

import numpy as np
import pytest
from scipy import stats

from dpnb.privacy import PoissonSampler, ShuffleSampler, physical_batches

N, Q, STEPS = 20, 0.3, 4000


@pytest.fixture(scope="module")
def inclusion():
    """bool [steps, examples]."""
    sampler, made = PoissonSampler(N, Q, seed=7), np.zeros((STEPS, N), bool)
    for step in range(STEPS):
        made[step, sampler.indices(step)] = True
    return made


def test_inclusion_has_the_mean_and_variance_of_a_bernoulli(inclusion):
    """Five standard errors on each of 20 examples: false alarms in 1 of 80,000 seeds."""
    error = np.sqrt(Q * (1 - Q) / STEPS)
    assert np.abs(inclusion.mean(0) - Q).max() < 5 * error
    assert np.abs(inclusion.var(0) - Q * (1 - Q)).max() < 5 * error * abs(1 - 2 * Q)


def test_examples_and_steps_are_independent(inclusion):
    """Covariances of 190 pairs of examples, and of each example with itself one step later."""
    centred = inclusion - Q
    error = Q * (1 - Q) / np.sqrt(STEPS)
    pairs = [np.mean(centred[:, i] * centred[:, j]) for i, j in itertools.combinations(range(N), 2)]
    lagged = (centred[1:] * centred[:-1]).mean(0)
    assert np.abs(pairs).max() < 5 * error
    assert np.abs(lagged).max() < 5 * error


def test_sizes_are_binomial(inclusion):
    """Chi-square, 1 % false alarms over seeds; a fixed size or a wrong q is far beyond it."""

    def p_value(sizes, q):
        low, high = stats.binom.ppf([0.01, 0.99], N, Q).astype(int)
        edges = np.arange(low, high + 1)
        seen = [np.sum(sizes <= low), *[np.sum(sizes == k) for k in edges[1:-1]], np.sum(sizes >= high)]
        cdf = stats.binom.cdf(edges[:-1], N, q)
        expected = STEPS * np.diff(np.concatenate([[0], cdf, [1]]))
        return stats.chisquare(seen, expected).pvalue

    sizes = inclusion.sum(1)
    assert p_value(sizes, Q) > 0.01
    assert p_value(sizes, 1.05 * Q) < 1e-6
    assert p_value(np.full(STEPS, int(N * Q)), Q) < 1e-6


def test_probability_is_not_rounded():
    """A thousandth of q is felt: 2,000 draws of 50,000, five standard errors are 0.02 % of q."""
    n, q, steps = 50_000, 0.4321, 400
    mean = np.mean([len(PoissonSampler(n, q, 1).indices(s)) for s in range(steps)]) / n
    error = np.sqrt(q * (1 - q) / (n * steps))
    assert abs(mean - q) < 5 * error
    assert 5 * error < 0.002 * q


def test_batches_depend_on_seed_and_step_only():
    sampler = PoissonSampler(1000, 0.5, 3)
    assert np.array_equal(sampler.indices(5), PoissonSampler(1000, 0.5, 3).indices(5))
    assert not np.array_equal(sampler.indices(5), sampler.indices(6))
    assert not np.array_equal(sampler.indices(5), PoissonSampler(1000, 0.5, 4).indices(5))
    assert (np.diff(sampler.indices(5)) > 0).all()


def test_all_and_none():
    assert len(PoissonSampler(10, 1.0, 0).indices(0)) == 10
    assert any(len(PoissonSampler(2, 0.1, 0).indices(s)) == 0 for s in range(5))
    assert list(physical_batches(PoissonSampler(2, 1e-12, 0).indices(0), 4)) == []


@pytest.mark.parametrize("n, size", [(10, 3), (10, 10), (7, 5), (12, 4)])
def test_shuffle_shows_an_example_at_most_once_an_epoch(n, size):
    """Nobody twice: what is left of an epoch, less than a batch, is dropped."""
    sampler, a_pass = ShuffleSampler(n, size, seed=2), n // size
    epochs = [np.concatenate([sampler.indices(e * a_pass + i) for i in range(a_pass)]) for e in range(5)]
    assert all(len(set(epoch)) == len(epoch) == a_pass * size for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert all(len(sampler.indices(s)) == size for s in range(20))


def test_no_batch_of_a_shuffle_holds_an_example_twice():
    """At the size of CIFAR-10, across the ends of epochs."""
    sampler = ShuffleSampler(50_000, 4096, 0)
    assert all(len(np.unique(sampler.indices(s))) == 4096 for s in range(40))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_physical_batches_cover_everything_once(count):
    indices = np.arange(100, 100 + count, dtype=np.int32)
    batches = list(physical_batches(indices, 4))
    assert len(batches) == -(-count // 4)
    assert all(i.shape == m.shape == (4,) and i.dtype == np.int32 and m.dtype == bool for i, m in batches)
    assert np.array_equal(np.concatenate([i[m] for i, m in batches]), indices)
    assert all((i[~m] == 0).all() for i, m in batches)


@pytest.mark.parametrize("make", [lambda: PoissonSampler(5, 0.0, 0), lambda: PoissonSampler(5, 1.1, 0),
                                  lambda: ShuffleSampler(5, 6, 0), lambda: ShuffleSampler(5, 0, 0)])  # fmt: skip
def test_impossible_samplers_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
