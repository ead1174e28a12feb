"""The convolution and its per-example weight gradient against JAX's own, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from dpnb.gradients import FORMULATIONS, conv_general_dilated, formulation, per_example

pytestmark = pytest.mark.usefixtures("strict_ranks")
TOLERANCE = 1e-13
# Most of the time here is compilation; this halves it.
EXAMPLES, VIEWS = 3, 2

# name: (spatial input, kernel, channels in, out, strides, padding, dilation, groups)
CASES = {
    "3x3": ((5, 6), (3, 3), 4, 6, (1, 1), "SAME", None, 1),
    "3x3 stride 2": ((6, 5), (3, 3), 4, 6, (2, 2), "SAME", (1, 1), 1),
    "1x1": ((4, 4), (1, 1), 4, 6, (1, 1), "SAME", None, 1),
    "1x1 stride 2": ((5, 4), (1, 1), 4, 6, (2, 2), "SAME", None, 1),
    "valid": ((6, 5), (3, 2), 2, 3, (1, 2), "VALID", None, 1),
    "explicit": ((6, 5), (3, 3), 2, 3, (1, 1), ((2, 0), (1, 4)), None, 1),
    "negative": ((7, 8), (3, 2), 2, 3, (1, 1), ((-1, 2), (0, -2)), None, 1),
    "negative stride 2": ((7, 8), (3, 2), 2, 3, (2, 2), ((-1, 2), (0, -2)), None, 1),
    "wider than the kernel": ((3, 3), (2, 2), 2, 3, (1, 1), ((4, 3), (2, 5)), None, 1),
    "dilated": ((7, 6), (3, 2), 2, 3, (1, 1), "SAME", (2, 3), 1),
    "dilated stride 2": ((8, 7), (2, 3), 2, 3, (2, 3), ((1, 2), (0, 3)), (3, 2), 1),
    "grouped": ((4, 5), (3, 3), 4, 6, (1, 1), "SAME", None, 2),
    "depthwise stride 2": ((6, 5), (3, 3), 4, 8, (2, 2), "SAME_LOWER", None, 4),
    "1-d": ((9,), (4,), 3, 5, (2,), "SAME", (2,), 1),
    "3-d": ((4, 3, 5), (2, 3, 2), 2, 3, (1, 2, 1), "SAME", (1, 1, 2), 1),
}  # fmt: skip


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def error(got, want):
    """Largest error over the leaves, each relative to the norm of the leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in pairs)


def setup(case):
    """Ours and JAX's convolution `conv(x, w)`, and inputs [examples, views, ...] and kernel for it."""
    spatial, kernel, cin, cout, strides, padding, dilation, groups = CASES[case]
    axes = "DHW"[3 - len(spatial) :]
    options = dict(
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )
    ours = functools.partial(conv_general_dilated, **options)
    theirs = functools.partial(lax.conv_general_dilated, **options)
    shapes = (EXAMPLES, VIEWS, *spatial, cin), (*kernel, cin // groups, cout)
    return ours, theirs, *arrays(*shapes)


def loss(conv, w, x):
    return jnp.sin(conv(x, w)).sum()


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_jax_example_by_example_in_every_formulation(case, float64):
    ours, theirs, x, w = setup(case)

    def grads(conv, name="auto"):
        with formulation(name):
            return jax.vmap(jax.grad(functools.partial(loss, conv), (0, 1)), (None, 0))(w, x)

    @jax.jit
    def both():
        one = functools.partial(jax.grad(functools.partial(loss, theirs), (0, 1)), w)
        same = ours(x[0], w), theirs(x[0], w)
        return *same, lax.map(one, x), [grads(ours, name) for name in FORMULATIONS]

    y, also, want, got = both()
    assert error(y, also) == 0
    for name, g in zip(FORMULATIONS, got, strict=True):
        assert error(g, want) < TOLERANCE, name


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("case", ["3x3 stride 2", "grouped"])
def test_unbatched_cotangents_and_inputs(case, name, float64):
    """What does not depend on the example reaches the batching rule without an examples axis."""
    ours, theirs, x, w = setup(case)
    scale, direction = arrays((EXAMPLES,), theirs(x[0], w).shape, seed=1)

    def batched_input(conv, w, x, scale):  # the cotangent is `direction` for all examples
        return (conv(x, w) * direction).sum()

    def batched_cotangent(conv, w, _, scale):  # the input is x[0] for all examples
        return (conv(x[0], w) * scale).sum()

    def neither(conv, w, _, scale):
        return (conv(x[0], w) * direction).sum() + scale

    for f in (batched_input, batched_cotangent, neither):

        @jax.jit
        def both():
            one = jax.grad(functools.partial(f, theirs))
            loop = lax.map(lambda a: one(w, *a), (x, scale))
            return jax.vmap(jax.grad(functools.partial(f, ours)), (None, 0, 0))(w, x, scale), loop

        with formulation(name):
            got, want = both()
        assert error(got, want) < TOLERANCE, f.__name__


@pytest.mark.parametrize("name", ["unrolled", "sliced"])
def test_nested_vmap_and_scan(name, float64):
    """An ensemble of kernels over the examples, and a loop over microbatches."""
    ours, theirs, x, w = setup("3x3 stride 2")
    ensemble = jnp.stack([w, 2 * w])

    def grads(conv):
        per_example = jax.vmap(jax.grad(functools.partial(loss, conv)), (None, 0))
        scanned = lax.scan(lambda total, x: (total + per_example(w, x[None])[0], None), 0 * w, x)[0]
        return jax.vmap(per_example, (0, None))(ensemble, x), scanned

    with formulation(name):
        got = jax.jit(lambda: grads(ours))()
    assert error(got, jax.jit(lambda: grads(theirs))()) < TOLERANCE


def test_the_batching_rule_of_other_backends(trace_for, float64):
    ours, theirs, x, w = setup("3x3")
    want = jax.jit(jax.vmap(jax.grad(functools.partial(loss, theirs)), (None, 0)))(w, x)
    trace_for("gpu")
    got = jax.vmap(jax.grad(functools.partial(loss, ours)), (None, 0))
    products = str(jax.make_jaxpr(got)(w, x)).count("dot_general[")
    assert products == 9, "sliced: one product for each kernel offset"
    assert error(jax.jit(got)(w, x), want) < TOLERANCE


@pytest.mark.parametrize("backend, channels, stride, products", [
    ("gpu", 64, 1, 9), ("gpu", 64, 2, 1), ("gpu", 128, 1, 1), ("gpu: Tesla T4", 64, 1, 0), ("tpu", 128, 2, 0),
])  # fmt: skip
def test_the_formulation_is_the_fastest_measured(trace_for, backend, channels, stride, products):
    """On an H100, see docs/performance.md: "im2col" is one product, "sliced" nine, others are convolutions."""
    trace_for(backend)

    def f(w, x):
        layout = ("NHWC", "HWIO", "NHWC")
        y = conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=layout)
        return y.sum()

    w, x = (jax.ShapeDtypeStruct(s, "float32") for s in ((3, 3, channels, 8), (2, 2, 8, 8, channels)))
    program = str(jax.make_jaxpr(jax.vmap(jax.grad(f), (None, 0)))(w, x))
    assert program.count("dot_general[") == products


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_per_example_is_vmap(backend, trace_for, float64):
    trace_for(backend)
    a, b, c = arrays((3, 2, 4), (4,), (3, 2))
    tree = {"a": a, "b": b}

    def f(tree, c):
        return {"product": tree["a"] @ tree["b"] + c, "sum": c.sum()}

    axes = ({"a": 0, "b": None}, 0)
    assert error(jax.vmap(per_example(f), axes)(tree, c), jax.vmap(f, axes)(tree, c)) < TOLERANCE
    calls = str(jax.make_jaxpr(jax.vmap(per_example(f), axes))(tree, c)).count("dot_general")
    assert calls == (3 if backend == "cpu" else 1)


def grouped(function, *args):
    """Whether a program contains a convolution in as many groups as there are examples."""
    return f"group_count={EXAMPLES}" in str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize("kernel", [(3, 3), (5,)])
def test_flax_conv_takes_the_rule(kernel):
    """Through `nnx.Conv(conv_general_dilated=...)` no grouped convolution is left, and was there before."""

    def grads(**options):
        conv = nnx.Conv(4, 6, kernel, strides=2, rngs=nnx.Rngs(0), **options)
        graph, params = nnx.split(conv)
        f = jax.vmap(jax.grad(lambda p, x: jnp.sin(nnx.merge(graph, p)(x)).sum()), (None, 0))
        return f, params

    (x,) = arrays((EXAMPLES, VIEWS, *[6 for _ in kernel], 4))
    ours, params = grads(conv_general_dilated=conv_general_dilated)
    theirs, _ = grads()
    assert grouped(theirs, params, x)
    assert not grouped(ours, params, x)
    assert error(jax.jit(ours)(params, x), jax.jit(theirs)(params, x)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        dict(dimension_numbers=None),
        dict(lhs_dilation=(2, 2)),
        dict(batch_group_count=2, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        dict(preferred_element_type=jnp.float64, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        dict(padding="VALID", lhs_dilation=(1, 1), dimension_numbers=("NHWC", "HWOI", "NHWC")),
    ],
    ids=["NCHW", "transposed", "batch groups", "wider output", "other kernel layout"],
)
def test_everything_else_is_left_to_jax(options, float64):
    x, w = arrays((4, 4, 4, 4), (4, 4, 4, 4))
    options = dict(window_strides=(1, 1), padding=((1, 1), (1, 1))) | options
    if "preferred_element_type" in options:
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)

    def grads(conv):
        f = lambda x, w: jnp.sin(conv(x, w, **options)).sum()
        return conv(x, w, **options), jax.grad(f, (0, 1))(x, w)

    got, want = grads(conv_general_dilated), grads(lax.conv_general_dilated)
    assert jax.tree.map(lambda g: g.dtype, got) == jax.tree.map(lambda g: g.dtype, want)
    assert error(got, want) == 0


def test_half_precision_keeps_its_dtype():
    x, w = (a.astype(jnp.bfloat16) for a in arrays((EXAMPLES, VIEWS, 5, 5, 4), (3, 3, 4, 6)))
    numbers = dict(padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for name in FORMULATIONS:
        with formulation(name):
            f = lambda w, x: conv_general_dilated(x, w, (1, 1), **numbers).astype(float).sum()
            grads = jax.eval_shape(jax.vmap(jax.grad(f, (0, 1)), (None, 0)), w, x)
        assert [g.dtype for g in grads] == [jnp.bfloat16] * 2


def test_formulation_is_restored_and_checked():
    ours, _, x, w = setup("3x3")
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)

    def program():
        return jax.vmap(jax.grad(functools.partial(loss, ours)), (None, 0))

    with pytest.raises(RuntimeError), formulation("grouped"):
        assert grouped(program(), w, x)
        raise RuntimeError
    assert not grouped(program(), w, x)
    with pytest.raises(ValueError, match="formulation must be one of .*'fastest'"), formulation("fastest"):
        pass


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", FORMULATIONS)
def test_what_is_not_finite_stays_in_its_example(name, groups, float64):
    """XLA:CPU multiplies the examples of a grouped convolution by zeros: NaN would reach all of them."""
    x, w = arrays((EXAMPLES, VIEWS, 5, 5, 4), (3, 3, 4 // groups, 6))

    def f(w, x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jnp.sin(
            conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups)
        ).sum()

    with formulation(name):
        per_example = jax.jit(jax.vmap(jax.grad(f), (None, 0)))
        before = per_example(w, x)
        for content in (jnp.nan, jnp.inf):
            after = per_example(w, x.at[1, 0, 2, 2, 0].set(content))
            np.testing.assert_array_equal(after[0], before[0])
            np.testing.assert_array_equal(after[2], before[2])
            assert not jnp.isfinite(after[1]).all()
