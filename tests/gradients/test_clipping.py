"""The clipped-gradient core against a plain loop over examples, and what its guarantee promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from shared_runs import traced_for
from tiny_networks import small_nf_resnet, small_nfnet, small_wide_resnet

from dpnb.gradients import FORMULATIONS, clipped_grad, clipping, conv_general_dilated, formulation
from dpnb.models import WideResNet, functional
from dpnb.models.layers import Conv
from dpnb.models.wide_resnet import Block

pytestmark = pytest.mark.usefixtures("strict_ranks")
TOLERANCE = 1e-12

NORM = functools.partial(nnx.GroupNorm, num_groups=16, epsilon=1e-5)
# name: (module from random streams, shape of one view)
LAYERS = {
    "conv 3x3": (lambda r: Conv(4, 6, 3, rngs=r), (5, 6, 4)),
    "conv 3x3 stride 2": (lambda r: Conv(4, 6, 3, stride=2, rngs=r), (6, 5, 4)),
    "conv 1x1": (lambda r: Conv(4, 6, 1, rngs=r), (4, 4, 4)),
    "conv 1x1 stride 2": (lambda r: Conv(4, 6, 1, stride=2, rngs=r), (5, 4, 4)),
    "stem": (lambda r: Conv(3, 16, 3, rngs=r), (6, 6, 3)),
    "plain conv 3x3": (lambda r: Conv(4, 6, 3, standardised=False, rngs=r), (5, 6, 4)),
    "plain conv 1x1 stride 2": (lambda r: Conv(4, 6, 1, stride=2, standardised=False, rngs=r), (5, 4, 4)),
    "group norm": (lambda r: NORM(32, rngs=r), (3, 4, 32)),
    "group norm of single channels": (lambda r: NORM(16, rngs=r), (3, 4, 16)),
    "dense": (lambda r: nnx.Linear(6, 4, rngs=r), (6,)),
    "first block": (lambda r: block(r, 16, 32, 2, True), (6, 6, 16)),
    "other block": (lambda r: block(r, 16, 16, 1, False), (4, 4, 16)),
    "flax conv": (lambda r: nnx.Conv(4, 6, (3, 3), strides=2, rngs=r), (5, 6, 4)),
    "flax conv with our rule": (
        lambda r: nnx.Conv(4, 6, (3, 3), strides=2, conv_general_dilated=conv_general_dilated, rngs=r),
        (5, 6, 4),
    ),
    "flax layer norm": (lambda r: nnx.LayerNorm(6, rngs=r), (3, 6)),
    "flax attention": (lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), (5, 8)),
    "flax embedding": (lambda r: nnx.Embed(7, 4, rngs=r), (6,)),
}


def block(rngs, cin, cout, stride, first):
    conv = functools.partial(Conv, rngs=rngs)
    return Block(cin, cout, stride, first, conv=conv, norm=functools.partial(NORM, rngs=rngs))


def setup(make, shape, views, *, examples=3, integers=False):
    """Parameters (every one random, float64), a loss per view, and examples of unequal size."""
    params, apply = functional(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape) + (p.ndim == 1)), params)
    shape = (examples, views, *shape)
    inputs = rng.integers(0, 7, shape) if integers else rng.standard_normal(shape)
    weights = (-3.0) ** np.arange(-1, examples - 1).reshape(-1, 1)  # spreads the norms around the clip

    def loss(params, example):
        inputs, weight = example
        outputs = apply(params, inputs)
        outputs = jnp.sin(outputs + 1).reshape(len(inputs), -1)
        return weight * (outputs * jnp.cos(jnp.arange(outputs.shape[1]))[None]).sum(1)

    return params, loss, (jnp.asarray(inputs), jnp.asarray(weights))


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(g))) for g in jax.tree.leaves(tree)))


def gradients(loss, params, examples):
    """The gradient and the loss of one example after the other, as numpy arrays."""
    gradient = jax.jit(jax.value_and_grad(lambda p, example: loss(p, example).mean()))
    for i in range(len(jax.tree.leaves(examples)[0])):
        value, g = gradient(params, jax.tree.map(lambda x, i=i: x[i], examples))
        yield jax.tree.map(np.asarray, g), float(value)


def naive(grads, clip_norm):
    """Clipped and summed one after the other."""
    scaled = [jax.tree.map(lambda x, g=g: x * min(1.0, clip_norm / norm(g)), g) for g in grads]
    return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), scaled)


def error(got, want):
    """Largest error over the leaves, relative to the leaf (or a thousandth of the whole)."""
    whole = norm(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(norm(np.asarray(g) - np.asarray(w)) / (norm(w) + 1e-3 * whole) for g, w in pairs)


def check_against_loop(params, loss, examples, *ways):
    """Each way is a dict of options, among them perhaps the backend to trace for; one loop serves all ways."""
    grads, losses = zip(*gradients(loss, params, examples), strict=True)
    norms = np.array([norm(g) for g in grads])
    low, high = max(itertools.pairwise(np.sort(norms)), key=lambda pair: pair[1] / pair[0])
    clip_norm = float(np.sqrt(low * high))  # some are clipped, some are not
    want = naive(grads, clip_norm)
    assert norms.min() < 0.9 * clip_norm < 1.1 * clip_norm < norms.max()
    for way in ways or [{}]:
        options = dict(way)
        backend_ = options.pop("backend", "cpu")
        with traced_for(backend_):
            got, info = jax.jit(clipped_grad(loss, clip_norm, **options))(params, examples)
        assert error(got, want) < TOLERANCE, way
        np.testing.assert_allclose(info.norms, norms, rtol=TOLERANCE, err_msg=str(way))
        np.testing.assert_allclose(info.losses, losses, rtol=TOLERANCE, err_msg=str(way))


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, trace_for):
    """Also what is traced for accelerators: other products, other sums, the same numbers."""
    trace_for(request.param)


# 1. The same as a loop over examples.


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_matches_a_loop_over_examples(layer, views, float64):
    check_against_loop(*setup(*LAYERS[layer], views, integers=layer == "flax embedding"))


BOTH_FORMS = dict(form="materialised"), dict(form="two-pass")
# name: (module from random streams, shape of one view, views, ways of clipping)
NETWORKS = {
    "wide-resnet, one view": (
        lambda r: WideResNet(10, 1, rngs=r), (6, 6, 3), 1, (dict(backend="cpu"), dict(backend="gpu")),
    ),
    "wide-resnet": (
        small_wide_resnet, (6, 6, 3), 4,
        (dict(microbatch_size=1), dict(backend="gpu"), dict(form="two-pass")),
    ),
    "nf-resnet": (small_nf_resnet, (16, 16, 3), 2, BOTH_FORMS),
    "nfnet": (small_nfnet, (16, 16, 3), 2, BOTH_FORMS),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "views", "ways"), NETWORKS.values(), ids=NETWORKS)
def test_whole_networks_match_a_loop_over_examples(make, shape, views, ways, float64):
    check_against_loop(*setup(make, shape, views, examples=2), *ways)


@pytest.mark.parametrize("name", sorted({*FORMULATIONS} - {"auto"}))
def test_every_formulation_matches_a_loop_over_examples(name, float64):
    with formulation(name):
        check_against_loop(*setup(*LAYERS["first block"], 2, examples=3))


def test_any_pure_loss_of_any_tree():
    """Not only models: tuples and dicts of parameters, a scalar loss, auxiliary outputs."""

    def loss(params, example):
        (w, b), x = params["layer"], example["x"]
        y = w @ x + b
        return jnp.tanh(y).sum(), {"y": y, "twice": 2 * example["x"]}

    rng = np.random.default_rng(0)
    params = {"layer": (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32), jnp.ones(2))}
    examples = {"x": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)}
    grads, losses = zip(*gradients(lambda p, e: loss(p, e)[0], params, examples), strict=True)
    for size in (None, 2):
        grad = clipped_grad(loss, 0.5, has_aux=True, microbatch_size=size)
        got, info = jax.jit(grad)(params, examples)
        assert error(got, naive(grads, 0.5)) < 1e-5
        np.testing.assert_allclose(info.norms, [norm(g) for g in grads], rtol=1e-5)
        np.testing.assert_allclose(info.losses, losses, rtol=1e-5)
        np.testing.assert_array_equal(info.aux["twice"], 2 * examples["x"])
        assert info.aux["y"].shape == (4, 2)


# 2. The mean over views is inside the clip.


def test_identical_views_are_one_view(float64):
    params, loss, (inputs, weights) = setup(*LAYERS["conv 3x3"], 1)
    grad = clipped_grad(loss, 1.0)
    one, info = jax.jit(grad)(params, (inputs, weights))
    four, info4 = jax.jit(grad)(params, (jnp.repeat(inputs, 4, axis=1), weights))
    assert error(four, one) < TOLERANCE
    np.testing.assert_allclose(info4.norms, info.norms, rtol=TOLERANCE)
    np.testing.assert_allclose(info4.losses, info.losses, rtol=TOLERANCE)


def test_the_clip_sees_the_mean_over_views():
    """Two opposite views of norm 50 and 51: their mean has norm 0.5 and passes unclipped.

    Clipped one by one they would cancel to zero; summed, not averaged, they would be clipped.
    """
    views = jnp.array([[[30.0, 40.0], [-30.6, -40.8]]])
    grad = clipped_grad(lambda w, x: x @ w, 1.0)
    total, info = grad(jnp.zeros(2), views)
    np.testing.assert_allclose(total, [-0.3, -0.4], rtol=1e-4)
    np.testing.assert_allclose(info.norms, [0.5], rtol=1e-4)


# 3. Sensitivity.

HOSTILE = {
    "1e30": lambda x: jnp.full_like(x, 1e30),
    "-1e30": lambda x: x * -1e30,
    "1e15": lambda x: x * 1e15,
    "largest": lambda x: jnp.full_like(x, np.finfo(np.float32).max),
    "smallest": lambda x: jnp.full_like(x, 1e-45),
    "inf": lambda x: jnp.full_like(x, jnp.inf),
    "-inf": lambda x: x.at[:, 0].set(-jnp.inf),
    "nan": lambda x: jnp.full_like(x, jnp.nan),
    "one nan in one view": lambda x: x.at[(0,) * x.ndim].set(jnp.nan),
}


def convolutional(statistics=False):
    """A small network without a norm that would tame large inputs; or with a batch norm."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = Conv(3, 4, 3, standardised=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs) if statistics else lambda x: x
            self.linear = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    params, apply = functional(Net(nnx.Rngs(0)))

    def loss(params, example):
        inputs, label = example
        logits = apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.full(len(inputs), label))

    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((4, 2, 5, 5, 3)), jnp.float32)
    return params, loss, (inputs, jnp.array([0, 1, 2, 0]))


@pytest.mark.parametrize("statistics", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("rescale", [False, True])
def test_sensitivity(rescale, statistics, backend):
    """Neighbours differ by one example of any content, at any place; batch norm cannot mix them."""
    params, loss, (inputs, labels) = convolutional(statistics)
    clip_norm = 0.125
    grad = clipped_grad(loss, clip_norm, rescale_to_unit_norm=rescale)
    call = jax.jit(lambda examples, mask: grad(params, examples, mask)[0])
    assert grad.sensitivity == (1.0 if rescale else clip_norm)
    everyone, reached = jnp.ones(4, bool), []
    for place in (0, 3):
        for name, hostile in {"itself": lambda x: x, **HOSTILE}.items():
            changed = inputs.at[place].set(hostile(inputs[place])), labels
            with_it = call(changed, everyone)
            without = call(changed, everyone.at[place].set(False))
            assert np.isfinite(norm(with_it)), name
            distance = norm(jax.tree.map(np.subtract, with_it, without))
            assert distance <= grad.sensitivity * (1 + 1e-5), name
            reached.append(distance)
            if name in ("inf", "nan", "one nan in one view"):
                assert distance == 0, name
    assert max(reached) > 0.999 * grad.sensitivity, "the bound is met, so the test has teeth"


def test_sensitivity_at_any_parameters():
    params, loss, examples = convolutional()
    for hostile in (jnp.nan, jnp.inf, 1e30):
        broken = jax.tree.map(lambda p, h=hostile: p.at[(0,) * p.ndim].set(h), params)
        total, info = jax.jit(clipped_grad(loss, 1.0))(broken, examples)
        assert norm(total) <= 4 * (1 + 1e-5)
        if np.isnan(hostile):
            assert norm(total) == 0 and np.isnan(info.norms).all()


def test_non_finite_gradients_of_finite_losses_contribute_zero(backend):
    grad = clipped_grad(lambda w, x: jnp.sqrt(w * x).sum(), 1.0)  # sqrt has no slope at zero
    total, info = grad(jnp.ones(2), jnp.array([[4.0, 0.0], [0.0, 0.0]]))
    alone, _ = grad(jnp.ones(2), jnp.array([[4.0, 1.0]]))
    assert norm(total) == 0 and np.isfinite(info.losses).all() and not np.isfinite(info.norms).any()
    assert norm(alone) > 0


def test_gradients_beyond_float32_contribute_zero(backend):
    """A norm whose square is infinite cannot be clipped in float32; one below can."""
    grad = clipped_grad(lambda w, x: w @ x, 1.0)
    total, info = grad(jnp.zeros(2), jnp.array([[1e30, 0.0], [3e15, 4e15]]))
    np.testing.assert_allclose(total, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(info.norms, [np.inf, 5e15], rtol=1e-6)


# 4. Padding and physical batches.


def check_padding_never_matters(call, params, inputs, labels):
    """(sum, info) of four examples, two of them padding, whatever these hold."""
    mask = jnp.array([True, False, True, False])
    total, info = call(params, (inputs.at[~mask].set(0), labels), mask)
    for name, hostile in HOSTILE.items():
        padding = hostile(jnp.ones_like(inputs[0]))
        other, info_other = call(params, (inputs.at[~mask].set(padding), labels), mask)
        assert jax.tree.all(jax.tree.map(np.array_equal, total, other)), f"{name}: the same to the last bit"
        np.testing.assert_array_equal(info_other.norms, info.norms)
        np.testing.assert_array_equal(info_other.losses, info.losses)
    return total, info


def test_content_of_padding_never_matters(backend):
    params, loss, (inputs, labels) = convolutional()
    mask, call = jnp.array([True, False, True, False]), jax.jit(clipped_grad(loss, 0.1))
    total, info = check_padding_never_matters(call, params, inputs, labels)
    assert not info.norms[1] and not info.losses[1] and info.norms[0] > 0
    alone, _ = call(params, (inputs[mask], labels[mask]), mask[mask])
    assert error(total, alone) < 1e-5


def test_nobody_is_a_batch_too(backend):
    params, loss, examples = convolutional()
    total, info = jax.jit(clipped_grad(loss, 0.1))(params, examples, jnp.zeros(4, bool))
    assert norm(total) == 0 and norm(info.norms) == 0


def test_any_microbatch_and_any_physical_batch_give_the_same_sum(float64, backend):
    params, loss, (inputs, weights) = setup(*LAYERS["conv 3x3 stride 2"], 2, examples=6)
    mask = jnp.array([True, True, False, True, True, True])
    want, info = jax.jit(clipped_grad(loss, 1.0))(params, (inputs, weights), mask)
    for size in (1, 2, 3, 100):
        got, same = jax.jit(clipped_grad(loss, 1.0, microbatch_size=size))(params, (inputs, weights), mask)
        assert error(got, want) < 1e-13
        np.testing.assert_allclose(same.norms, info.norms, rtol=1e-13)
    for physical in (1, 3):
        call = jax.jit(clipped_grad(loss, 1.0), donate_argnums=3)
        total = jax.tree.map(jnp.zeros_like, params)
        for i in range(0, 6, physical):
            part = slice(i, i + physical)
            total, _ = call(params, (inputs[part], weights[part]), mask[part], total)
        assert error(total, want) < 1e-13


def on_eight_devices(grad, *arguments):
    """The sum over eight devices, each with its part of (params, examples, mask)."""

    def local(params, examples, mask):
        return jax.lax.psum(grad(params, examples, mask)[0], "data")

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(in_specs=(everywhere, data, data), out_specs=everywhere, check_vma=False)
    return jax.jit(jax.shard_map(local, mesh=mesh, **specs))(*arguments)


def test_eight_devices_give_the_same_sum(float64):
    assert jax.device_count() == 8
    params, loss, examples = setup(*LAYERS["conv 3x3 stride 2"], 2, examples=8)
    mask = jnp.arange(8) != 2
    want, _ = jax.jit(clipped_grad(loss, 1.0))(params, examples, mask)
    assert error(on_eight_devices(clipped_grad(loss, 1.0), params, examples, mask), want) < TOLERANCE


# 9. Without a clip it is the plain gradient; rescaled, the clip leaves the scale.


def test_without_a_clip_it_is_the_plain_gradient(float64):
    params, loss, examples = setup(*LAYERS["conv 3x3 stride 2"], 2)
    grad = clipped_grad(loss, float("inf"))
    got, _ = jax.jit(grad)(params, examples)
    batch_loss = lambda p: jax.vmap(loss, (None, 0))(p, examples).mean(1).sum()
    assert error(got, jax.jit(jax.grad(batch_loss))(params)) < TOLERANCE
    assert grad.sensitivity == float("inf")


@pytest.mark.parametrize("clip_norm", [0.5, float("inf")])
def test_a_large_matrix_is_added_as_a_small_one_is(clip_norm, float64, backend):
    """One example after another, for speed; padding and gradients that are not finite add nothing."""
    w = jnp.zeros((clipping.LARGE // 60, 61))
    x = jax.random.normal(jax.random.key(0), (6, *w.shape)).at[2, 3, 4].set(jnp.inf).at[4, 0, 0].set(jnp.nan)
    mask = jnp.array([True, True, True, False, True, True])
    total, info = jax.jit(clipped_grad(lambda w, x: (w * x).sum(), clip_norm))(w, x, mask)
    included = x[mask & jnp.isfinite(info.norms)]
    lengths = np.sqrt(np.square(included).sum((1, 2)))
    want = (included * np.minimum(1, clip_norm / lengths)[:, None, None]).sum(0)
    assert w.size > clipping.LARGE and len(included) == 3
    assert error(total, want) < TOLERANCE and norm(want) > 0.5


@pytest.mark.parametrize("clip_norm", [0.01, 3.0])
def test_rescaling_divides_by_the_clip_norm(clip_norm, float64):
    params, loss, examples = setup(*LAYERS["dense"], 2)
    plain, _ = clipped_grad(loss, clip_norm)(params, examples)
    rescaled, _ = clipped_grad(loss, clip_norm, rescale_to_unit_norm=True)(params, examples)
    assert error(jax.tree.map(lambda g: g * clip_norm, rescaled), plain) < TOLERANCE


# Numerics.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_clipped_and_summed_in_float32(dtype):
    """260 ones: a sum in bfloat16 stalls at 256, one in float16 of squares overflows at 65504."""
    ones = jnp.ones((260, 1), dtype)
    total, _ = jax.jit(clipped_grad(lambda w, x: w @ x, float("inf")))(jnp.zeros(1, dtype), ones)
    assert total.dtype == jnp.float32 and total[0] == 260
    wide = jnp.full((1, 300), 300, dtype)
    total, info = clipped_grad(lambda w, x: w @ x, 1.0)(jnp.zeros(300, dtype), wide)
    assert info.norms.dtype == jnp.float32
    np.testing.assert_allclose(info.norms, 300 * 300**0.5, rtol=1e-6)
    np.testing.assert_allclose(norm(total), 1, rtol=1e-6)


def test_half_precision_losses_are_averaged_in_float32():
    losses = jnp.array([[256.0, 1, 1, 1]], jnp.bfloat16)
    _, info = clipped_grad(lambda w, x: x + 0 * w.astype(x.dtype), 1.0)(jnp.zeros(1), losses)
    assert info.losses.dtype == jnp.float32 and info.losses[0] == 259 / 4


def test_half_precision_computation_keeps_float32_sums(backend):
    params, apply = functional(Conv(3, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 5, 5, 3)), jnp.float32)
    loss = lambda p, x: jnp.sin(apply(p, x)).sum((1, 2, 3))
    total, info = jax.jit(clipped_grad(loss, 1.0))(params, x)
    assert apply(params, x[0]).dtype == jnp.bfloat16
    assert {g.dtype for g in jax.tree.leaves((total, info.norms, info.losses))} == {np.dtype("float32")}
    exact, apply32 = functional(Conv(3, 4, 3, rngs=nnx.Rngs(0)))
    want, _ = jax.jit(clipped_grad(lambda p, x: jnp.sin(apply32(p, x)).sum((1, 2, 3)), 1.0))(exact, x)
    assert 0 < error(total, want) < 0.03


# Loss scaling.


@pytest.mark.parametrize("form", ["materialised", "two-pass"])
def test_scaling_by_powers_of_two_changes_no_bit_in_float32(form):
    params, x = (
        jnp.ones((5, 3)),
        jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 3)), jnp.float32),
    )
    loss = lambda p, x: jnp.square(x @ p.T).sum(-1)
    plain, scaled = (
        jax.jit(clipped_grad(loss, 1.0, form=form, loss_scaling=s))(params, x) for s in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, scaled)


def half(p, x):
    """A product in float16, and its gradient."""
    return (x.astype(jnp.float16) @ p.astype(jnp.float16)).astype(jnp.float32)


@pytest.mark.parametrize("form", ["materialised", "two-pass"])
def test_small_gradients_survive_float16(form):
    """Gradients of 1e-9, of which float16 keeps nothing; an example at a time, whatever the others' losses are."""
    params, x = jnp.array([1.0, 2.0]), jnp.array([[1e-3, 2e-3], [100.0, 50.0]])
    loss = lambda p, x: 1e-6 * half(p, x)
    exact = clipped_grad(lambda p, x: 1e-6 * x @ p, 1e-9, rescale_to_unit_norm=True)
    want = np.stack([exact(params, x[i : i + 1])[0] for i in range(2)])

    def each(**options):
        grad = jax.jit(clipped_grad(loss, 1e-9, rescale_to_unit_norm=True, form=form, **options))
        return np.stack([grad(params, x, jnp.arange(2) == i)[0] for i in range(2)])

    np.testing.assert_allclose(each(loss_scaling=True), want, rtol=2e-3)
    assert not each()[0].any()


@pytest.mark.parametrize("loss", [0.0, 1e-30, 1e-4, 2.3, 1e4, 1e30, float("inf"), float("nan"), -5.0])
def test_scales_are_powers_of_two_within_bounds(loss):
    grad = clipped_grad(half, 1.0, loss_scaling=True)
    mantissa, exponent = np.frexp(float(grad._scale(jnp.float32(loss))))
    assert mantissa == 0.5 and 0 <= exponent - 1 <= 20
    if 1e-3 < abs(loss) < 1000:
        assert 2**10 <= abs(loss) * 2.0 ** (exponent - 1) < 2**11


def test_an_example_that_overflows_float16_contributes_nothing(backend):
    """The norm says so; the others are not touched."""
    params, x = jnp.array([1.0, -1.0]), jnp.array([[1.0, 2.0], [6e4, 6e4], [3.0, 1.0]])
    grad = jax.jit(clipped_grad(half, 1.0, loss_scaling=True))
    total, info = grad(params, x)
    assert jnp.isfinite(info.norms).tolist() == [True, False, True]
    np.testing.assert_array_equal(total, grad(params, x, jnp.array([True, False, True]))[0])


# Errors.


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_clip_norm_must_be_positive(clip_norm):
    with pytest.raises(ValueError, match="clip_norm must be positive, got"):
        clipped_grad(jnp.dot, clip_norm)


def test_rescaling_needs_a_clip_norm():
    with pytest.raises(ValueError, match="rescale_to_unit_norm needs a finite clip_norm"):
        clipped_grad(jnp.dot, float("inf"), rescale_to_unit_norm=True)


def test_microbatches_must_divide_the_batch():
    with pytest.raises(ValueError, match="must divide the number of examples, got 2 and 3; pad"):
        clipped_grad(jnp.dot, 1.0, microbatch_size=2)(jnp.ones(2), jnp.ones((3, 2)))


def test_arrays_of_different_length_are_refused():
    """Slicing into microbatches would otherwise drop the surplus without a word."""
    grad = clipped_grad(lambda w, e: w @ e[0] * e[1], 1.0)
    w, x = jnp.zeros(3), jnp.ones((4, 3))
    for y, mask in ((jnp.ones(5), None), (jnp.ones(4), jnp.ones(6, bool))):
        with pytest.raises(ValueError, match="must share their first axis"):
            grad(w, (x, y), mask)


@pytest.mark.parametrize("size", [0, -1])
def test_microbatches_have_at_least_one_example(size):
    with pytest.raises(ValueError, match="microbatch_size must be at least 1"):
        clipped_grad(lambda w, e: w @ e, 1.0, microbatch_size=size)
