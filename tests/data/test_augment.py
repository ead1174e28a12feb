"""dpnb.data.augment: views against plain numpy, and their distribution.

Every key is fixed, so nothing here is flaky; each statistical test states the chance that a
correct implementation fails it under another key.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dpnb.data import augment

IMAGE = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
FALSE_ALARM = 1e-3


def reference(image):
    """All 2 x 9 x 9 views of the paper's code: normalise, pad, crop, flip; float64."""
    mean, std = (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)
    h, w, _ = image.shape
    padded = np.pad((image / 255.0 - mean) / std, ((4, 4), (4, 4), (0, 0)), mode="symmetric")
    crops = {(y, x): padded[y : y + h, x : x + w] for y, x in itertools.product(range(9), repeat=2)}
    return {(y, x, f): c[:, ::-1] if f else c for (y, x), c in crops.items() for f in (0, 1)}


def which(views, expected):
    """(y, x, flip) [n, 3] of each view, which must be exactly one of the expected ones."""
    names = np.array(list(expected))
    rows = np.stack(list(expected.values())).reshape(len(names), -1)
    flat = np.asarray(views, np.float64).reshape(len(views), -1)
    distance = np.abs(flat[:, None, :600] - rows[None, :, :600]).max(-1)  # the first rows tell them apart
    nearest = distance.argmin(1)
    assert np.sort(distance, 1)[:, 1].min() > 0.1
    np.testing.assert_allclose(flat, rows[nearest], atol=2e-6)
    return names[nearest]


@pytest.fixture(scope="module")
def drawn():
    """(y, x, flip) [400 examples, 16 views, 3] of as many examples with a key each."""
    keys = jax.random.split(jax.random.key(1), 400)
    views = jax.jit(jax.vmap(augment.views, (0, None, None)), static_argnums=2)(keys, IMAGE, 16)
    expected = reference(IMAGE)
    return np.stack([which(v, expected) for v in np.asarray(views)])


def uniform(counts):
    """The p-value of a chi-square test for equal probabilities."""
    counts = np.asarray(counts).ravel()
    assert counts.sum() >= 5 * counts.size
    return stats.chisquare(counts).pvalue


def test_normalise_is_the_papers():
    x = np.random.RandomState(1).randint(0, 256, (2, 5, 4, 6, 3)).astype(np.uint8)
    mean, std = np.array([0.49139968, 0.48215841, 0.44653091]), np.array([0.24703223, 0.24348513, 0.26158784])
    for part in (x, x[0], x[0, 0]):  # any number of leading axes
        out = augment.normalise(part)
        assert out.dtype == jnp.float32 and out.shape == part.shape
        np.testing.assert_allclose(out, (part / 255.0 - mean) / std, atol=1e-6)
    np.testing.assert_allclose(jax.jit(augment.normalise)(x), augment.normalise(jnp.asarray(x)), atol=1e-6)


def test_no_augmentation_is_the_plain_image():
    out = augment.views(jax.random.key(0), IMAGE, 0)
    assert out.shape == (1, 32, 32, 3) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out[0], augment.normalise(IMAGE))


@pytest.mark.parametrize("augmult", [1, 3])
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 12, 3)])
def test_views_are_crops_of_the_mirrored_image(augmult, shape):
    """Shape, dtype, and each view equal to one of numpy's; jitted, strict about broadcasting."""
    image = np.random.RandomState(2).randint(0, 256, shape).astype(np.uint8)
    with jax.numpy_rank_promotion("raise"):
        out = jax.jit(augment.views, static_argnums=2)(jax.random.key(3), jnp.asarray(image), augmult)
    assert out.shape == (augmult, *shape) and out.dtype == jnp.float32
    rows = np.stack(list(reference(image).values()))
    for view in np.asarray(out):
        assert np.abs(rows - view).max((1, 2, 3)).min() < 2e-6


def test_the_same_key_gives_the_same_views_and_vmap_changes_nothing():
    keys = jax.random.split(jax.random.key(4), 3)
    images = np.random.RandomState(3).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    batch = jax.vmap(augment.views, (0, 0, None))(keys, images, 4)
    for i in range(3):
        np.testing.assert_allclose(batch[i], augment.views(keys[i], images[i], 4), atol=1e-6)
    old = augment.views(jax.random.PRNGKey(4), images[0], 4)  # keys of the old style too
    np.testing.assert_array_equal(old, augment.views(jax.random.key(4), images[0], 4))


def test_offsets_and_flips_are_uniform(drawn):
    """All 162 outcomes equally likely, by chi-square on 6,400 views; false alarm 0.1 %."""
    y, x, flip = drawn.reshape(-1, 3).T
    counts = np.zeros((9, 9, 2), int)
    np.add.at(counts, (y, x, flip), 1)
    assert uniform(counts) > FALSE_ALARM
    for axes in ((1, 2), (0, 2), (0, 1)):  # and each alone, which has more power; 0.1 % each
        assert uniform(counts.sum(axes)) > FALSE_ALARM


def test_each_view_is_uniform(drawn):
    """As above for each of the 16 positions in the batch of views; false alarm 0.1 % in all."""
    level = FALSE_ALARM / (16 * 3)
    for k in range(16):
        for column, outcomes in enumerate((9, 9, 2)):
            counts = np.bincount(drawn[:, k, column], minlength=outcomes)
            assert uniform(counts) > level


def pair_counts(a, b, outcomes):
    counts = np.zeros((outcomes, outcomes), int)
    np.add.at(counts, (a.ravel(), b.ravel()), 1)
    return counts


def test_views_are_independent(drawn):
    """Neighbouring views, views of one example, and examples; false alarm 0.1 % in all.

    The pairs are disjoint, so that they are independent draws under the hypothesis.
    """
    pairs = {
        "neighbouring views": (drawn[:, 0::2], drawn[:, 1::2]),
        "first and second half of the views": (drawn[:, :8], drawn[:, 8:]),
        "neighbouring examples": (drawn[0::2], drawn[1::2]),
    }
    level = FALSE_ALARM / (len(pairs) * 3)
    for name, (a, b) in pairs.items():
        for column, outcomes in enumerate((9, 9, 2)):
            p = uniform(pair_counts(a[..., column], b[..., column], outcomes))
            assert p > level, (name, column)


def test_the_statistics_can_fail(drawn):
    """The same tests reject 8 offsets instead of 9, flips at 0.55, and one draw for two views."""
    y, flip = drawn[..., 0].ravel(), drawn[..., 2].ravel()
    assert uniform(np.bincount(y % 8, minlength=9)) < FALSE_ALARM
    biased = np.where(np.arange(flip.size) % 10 == 0, 1, flip)  # probability 0.55
    assert uniform(np.bincount(biased)) < FALSE_ALARM
    assert uniform(pair_counts(drawn[..., 0], drawn[..., 0], 9)) < FALSE_ALARM


def test_no_key_is_used_twice():
    """Statistics would not see offsets and flips drawn from one key; JAX's own checker does."""
    with jax.debug_key_reuse(True):
        jax.jit(augment.views, static_argnums=2)(jax.random.key(5), IMAGE, 3)


@pytest.mark.parametrize(
    ("image", "augmult", "says"),
    [
        (IMAGE, -1, "augmult must be 0"),
        (IMAGE[None], 2, "vmap over examples"),
        (IMAGE.astype(np.float32), 2, "must be uint8 .* got float32 .* once"),
        (IMAGE[..., :1], 0, r"got uint8 \[32, 32, 1\]"),
    ],
)
def test_wrong_arguments(image, augmult, says):
    with pytest.raises(ValueError, match=says):
        augment.views(jax.random.key(0), image, augmult)
