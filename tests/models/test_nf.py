"""Normaliser-free networks: parameters as published, variances as theory has them, and examples that never mix.

Their clipped gradients are compared to a loop in tests/gradients/test_clipping.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_networks import filled, small_nf_resnet, small_nfnet

from dpnb.models import NFNet, NFResNet, check_independent, functional
from dpnb.models.nf_resnet import expected_stds, scaled_relu
from dpnb.models.nfnet import scaled_gelu

PARAMETERS = [
    (NFResNet, 50, 25_557_048), (NFResNet, 101, 44_549_193), (NFResNet, 152, 60_192_858),
    (NFResNet, 200, 64_673_898), (NFNet, "F0", 71_489_284), (NFNet, "F1", 132_634_256), (NFNet, "F3", 254_924_200),
]  # fmt: skip
SMALL = [small_nf_resnet, functools.partial(small_nfnet, skip_gain=1.0)]
small = pytest.mark.parametrize("make", SMALL, ids=["nf-resnet", "nfnet"])


@pytest.mark.parametrize(("network", "size", "expected"), PARAMETERS)
def test_numbers_of_parameters(network, size, expected):
    params = nnx.state(nnx.eval_shape(lambda: network(size, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == expected


def test_sizes_that_do_not_exist():
    with pytest.raises(ValueError, match="14, 26, 50, 101, 152, 200"):
        NFResNet(18, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="F0, F1, F3"):
        NFNet("F2", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="deepmind or timm"):
        NFResNet(50, published_by="me", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("activation", [scaled_relu, scaled_gelu])
def test_activations_keep_the_variance_of_a_gaussian(activation):
    y = activation(jax.random.normal(jax.random.key(0), (400_000,)))
    np.testing.assert_allclose(y.var(), 1, rtol=0.01)  # the estimate's standard deviation is below 0.003


@pytest.mark.slow
def test_variance_grows_by_theory_and_starts_again_at_every_stage():
    """The variance behind each block of an NF-ResNet-50, against 1 + alpha^2 (blocks since the stage began).

    Gaussian images, random weights; the mean over channels and positions fluctuates by some per cent.
    """
    model = NFResNet(50, 10, width=0.5, rngs=nnx.Rngs(0))
    x = nnx.max_pool(model.stem(jax.random.normal(jax.random.key(1), (8, 64, 64, 3))), (3, 3), (2, 2), "SAME")
    x = (x - x.mean()) / x.std()  # the max-pool's output is no unit Gaussian; theory begins with one
    theory = [std**2 for std in expected_stds((3, 4, 6, 3))]
    assert theory[0] == 1 and theory[3] == pytest.approx(1.12) and theory[4] == pytest.approx(1.04)
    measured = []
    for block in model.blocks:
        measured.append(float(jnp.mean(jnp.var(x, (0, 1, 2)))))
        x = nnx.jit(block)(x)
    np.testing.assert_allclose(measured[1:], theory[1:], rtol=0.25)
    # Without beta the variances would multiply from stage to stage: the last would be 1.12 * 1.16 * 1.24.
    assert measured[-1] < 1.4


@pytest.mark.slow
@small
def test_no_example_moves_another(make):
    check_independent(filled(make), jax.random.normal(jax.random.key(0), (3, 16, 16, 3)))


@pytest.mark.slow
@small
def test_recomputation_changes_memory_and_not_the_gradient(make):
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    gradients = []
    for remat in (False, True):
        params, apply = functional(filled(functools.partial(make, remat=remat)))
        gradients.append(jax.jit(jax.grad(lambda p: jnp.square(apply(p, images)).sum()))(params))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * float(jnp.abs(a).max() + 1e-9))


@small
def test_half_precision_computes_and_keeps_the_parameters(make):
    params, apply = functional(filled(make))
    half_params, half = functional(filled(functools.partial(make, dtype=jnp.bfloat16)))
    assert {x.dtype for x in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    got, want = jax.jit(lambda p, x: (half(p, x), apply(p, x)))(params, images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.1 * float(jnp.abs(want).max()))


def test_skip_gain_zero_begins_as_the_shortcuts():
    model = SMALL[0](nnx.Rngs(0), skip_gain=0.0)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, model.blocks[2].conv0.kernel[...].shape[2]))
    assert model.blocks[2].shortcut is None
    np.testing.assert_array_equal(model.blocks[2](x), x)


@pytest.mark.slow
def test_stochastic_depth_drops_later_blocks_more_often_and_only_in_training():
    model = SMALL[0](nnx.Rngs(0, dropout=1), stochastic_depth=0.5)
    images = jax.random.normal(jax.random.key(1), (32, 8, 8, 3))
    call = nnx.jit(lambda model, images: model(images))  # keeps the state of random streams
    model.eval()
    np.testing.assert_array_equal(call(model, images), call(model, images))
    model.train()
    assert not np.array_equal(call(model, images), call(model, images))
    n = len(model.blocks)
    kept = [np.asarray(keep) if (keep := model.drop(i, 20_000)) is not None else None for i in range(n)]
    assert kept[0] is None  # rate 0.5 * 0 / n
    # Binomial means over 20,000: four standard deviations are 0.014.
    for i in range(1, n):
        assert abs(kept[i].mean() - (1 - 0.5 * i / n)) < 0.015
