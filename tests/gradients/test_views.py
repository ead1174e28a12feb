"""Layers that merge examples and views: exact in float64, one flat batch for the compiler, and no example in another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_networks import filled, small_nf_resnet, small_nfnet, small_wide_resnet

from dpnb.gradients import clipped_grad, group_norm
from dpnb.gradients.views import add, add_bias, fork, merged, multiply, per_view
from dpnb.models import functional
from dpnb.models.layers import mean_over_positions
from dpnb.models.nf_resnet import pooled

TOLERANCE = 1e-12
EXAMPLES, VIEWS, SIDE, CHANNELS = 3, 2, 4, 8
NETWORKS = {"wrn": small_wide_resnet, "nf-resnet": small_nf_resnet, "nfnet": small_nfnet}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def plain_group_norm(x, scale, bias):
    grouped = x.reshape(len(x), -1, 4, CHANNELS // 4)
    mean, variance = (f(grouped, (1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    return ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


# name: (ours, the same in plain JAX, shapes of parameters); both are functions (views, *parameters).
LAYERS = {
    "relu": (per_view(nnx.relu), nnx.relu, ()),
    "add": (lambda x: add(x, per_view(jnp.sin)(x)), lambda x: x + jnp.sin(x), ()),
    "fork": (lambda x: jnp.multiply(*fork(x)), lambda x: x * x, ()),
    "bias": (add_bias, lambda x, bias: x + bias, ((CHANNELS,),)),
    "multiply": (multiply, lambda x, factor: x * factor, ((),)),
    "mean": (mean_over_positions, lambda x: x.mean((1, 2)), ()),
    "pool": (lambda x: pooled(x, 2), lambda x: nnx.avg_pool(x, (2, 2), (2, 2)), ()),
    "group norm": (
        lambda x, *p: group_norm(x, *p, groups=4), plain_group_norm, ((CHANNELS,), (CHANNELS,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_each_example_are_those_of_plain_jax(layer, float64):
    """Of inputs and parameters, for parameters that all examples share, and for an ensemble of parameters."""
    ours, plain, shapes = LAYERS[layer]
    x = normal(EXAMPLES, VIEWS, SIDE, SIDE, CHANNELS)
    ensemble = [normal(2, *shape, seed=1 + i) for i, shape in enumerate(shapes)]

    def grads(f):
        def loss(parameters, x):
            y = f(x, *parameters)
            return (jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

        one = jax.grad(loss, (0, 1))
        per_example = jax.vmap(one, (None, 0))
        alone = per_example([p[0] for p in ensemble], x)
        both = jax.vmap(per_example, (0, None))(ensemble, x) if shapes else ()
        return alone, both, one([p[0] for p in ensemble], x[0])

    got, want = jax.jit(lambda: grads(ours))(), jax.jit(lambda: grads(plain))()
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(g - w).max()) <= TOLERANCE * float(jnp.abs(w).max())


def test_an_argument_may_be_the_same_for_all_examples(float64):
    x, y = normal(EXAMPLES, VIEWS, 5), normal(VIEWS, 5, seed=1)
    np.testing.assert_array_equal(jax.vmap(add, (0, None))(x, y), x + y)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="must be a multiple of groups, got 6 and 4"):
        group_norm(jnp.ones((1, 2, 6)), jnp.ones(6), jnp.zeros(6), groups=4)


def test_group_norm_of_half_precision_counts_in_float32():
    """4,000 positions of about 100: a sum in bfloat16 stalls, one of squares in float16 overflows."""
    x = 100 + normal(1, 4000, 4)
    for dtype in (jnp.bfloat16, jnp.float16):
        y = group_norm(x.astype(dtype), jnp.ones(4), jnp.zeros(4), groups=2, dtype=dtype)
        assert y.dtype == dtype and abs(float(y.astype(jnp.float32).mean())) < 0.01


def arrays_with_two_axes_of_examples(jaxpr) -> list[str]:
    """What reads or makes an array [examples, views, height, width, channels], other than a change of shape."""
    found = []
    for equation in jaxpr.eqns:
        inner = [
            p
            for p in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            )
        ]
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        for program in inner:
            found += arrays_with_two_axes_of_examples(program)
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        five = any(len(s) == 5 and s[:2] == (EXAMPLES, VIEWS) and min(s[2:4]) > 1 for s in shapes)
        if five and not inner and equation.primitive.name != "reshape":
            found.append(f"{equation.primitive.name} {shapes}")
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_one_flat_batch_to_the_compiler(network, trace_for):
    """On TPUs: a copy between layouts of five and of four axes was half of all cycles there."""
    trace_for("tpu")
    params, apply = functional(filled(NETWORKS[network]))
    grad = clipped_grad(lambda p, views: jnp.square(apply(p, views)).mean(-1), 1.0)
    views = jax.ShapeDtypeStruct((EXAMPLES, VIEWS, 16, 16, 3), "float32")
    found = arrays_with_two_axes_of_examples(jax.make_jaxpr(grad)(params, views).jaxpr)
    # Inputs and their cotangents are not activations; a grouped convolution takes its examples as groups.
    assert [line for line in found if not line.startswith(("transpose", "conv_general_dilated"))] == []


@pytest.mark.parametrize("platform", ["cpu", "gpu", "gpu: Tesla T4"])
@pytest.mark.parametrize("network", NETWORKS)
def test_no_example_reaches_the_gradient_of_another(network, platform, trace_for):
    """Also not the NaN of one: all others keep every bit of their gradients. TPUs: tests/test_compiled.py."""
    trace_for(platform)
    params, apply = functional(filled(NETWORKS[network]))

    @jax.jit
    def gradients(views):
        loss = lambda p, x: jnp.square(apply(p, x)).mean()
        return jax.vmap(jax.grad(loss), (None, 0))(params, views)

    views = normal(EXAMPLES, VIEWS, 16, 16, 3).astype(jnp.float32)
    before = gradients(views)
    for content in (jnp.nan, 1e30):
        after = gradients(views.at[1].set(content))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a[jnp.array([0, 2])], b[jnp.array([0, 2])])
        assert not all(bool(jnp.isfinite(b[1]).all()) for b in jax.tree.leaves(after))


def test_a_layer_that_mixes_views_of_its_batch_is_not_for_merging():
    """What `check_independent` finds in a network; here it is seen in the numbers."""
    mixing = merged(lambda _, x: x - x.mean(0))
    x = normal(EXAMPLES, VIEWS, 5)
    assert not np.allclose(jax.vmap(mixing, (None, 0))((), x), x - x.mean(1, keepdims=True))
