"""The two-pass form of the clipped-gradient core: the same sum and the same guarantee in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_clipping import (
    HOSTILE,
    LAYERS,
    backend,  # noqa: F401, a fixture
    check_against_loop,
    check_padding_never_matters,
    convolutional,
    error,
    gradients,
    naive,
    norm,
    on_eight_devices,
    setup,
)

from dpnb.experiments import experiment
from dpnb.gradients import FORMS, FORMULATIONS, ClippedGrad, choose_form, clipped_grad
from dpnb.models import NFNet, NFResNet, functional
from dpnb.models.layers import Conv

pytestmark = pytest.mark.usefixtures("strict_ranks")
two_pass = functools.partial(clipped_grad, form="two-pass")


def test_an_experiment_can_ask_for_every_form():
    assert ("auto", *FORMS) == experiment.FORMS and FORMULATIONS == experiment.FORMULATIONS


both_forms = pytest.mark.parametrize("form", FORMS)

# 1. The same sum; that of whole networks is compared in test_clipping.py.


@pytest.mark.parametrize("layer", ["other block", "group norm", "dense", "flax attention", "flax embedding"])
def test_layers_match_a_loop_over_examples(layer, float64):
    problem = setup(*LAYERS[layer], 2, examples=4, integers=layer == "flax embedding")
    way = dict(form="two-pass", microbatch_size=2)
    check_against_loop(*problem, dict(way, backend="cpu"), dict(way, backend="gpu"))


OPTIONS = {
    "clipped": dict(clip_norm=0.1),
    "rescaled": dict(clip_norm=0.1, rescale_to_unit_norm=True),
    "not clipped": dict(clip_norm=float("inf")),
    "microbatches": dict(clip_norm=0.1, microbatch_size=3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_materialised_form(options, float64, backend):  # noqa: F811
    params, loss, (inputs, weights) = setup(*LAYERS["conv 3x3 stride 2"], 3, examples=6)
    inputs = inputs.at[4].set(jnp.nan)
    mask = jnp.array([True, True, False, True, True, True])

    def with_aux(params, example):
        losses = loss(params, example)
        return losses, {"losses": losses, "weight": example[1]}

    so_far = jax.tree.map(jnp.ones_like, params)
    want, info = jax.jit(clipped_grad(with_aux, has_aux=True, **options))(
        params, (inputs, weights), mask, so_far
    )
    got, same = jax.jit(two_pass(with_aux, has_aux=True, **options))(params, (inputs, weights), mask, so_far)
    assert error(got, want) < 1e-13
    assert jax.tree.structure(same) == jax.tree.structure(info)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(info), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert np.isnan(same.norms[4]) and not same.norms[2] and same.aux["losses"].shape == (6, 3)


def test_batch_norm_sees_the_views_of_one_example():
    params, loss, examples = convolutional(statistics=True)
    grads, _ = zip(*gradients(loss, params, examples), strict=True)
    got, want = jax.jit(two_pass(loss, 0.1))(params, examples)[0], naive(grads, 0.1)
    assert norm(jax.tree.map(np.subtract, got, want)) < 1e-5 * norm(want)


@pytest.mark.slow
def test_the_mean_over_views_is_inside_the_clip(float64):
    params, loss, (inputs, weights) = setup(*LAYERS["conv 3x3"], 1)
    one, info = jax.jit(two_pass(loss, 1.0))(params, (inputs, weights))
    four, info4 = jax.jit(two_pass(loss, 1.0))(params, (jnp.repeat(inputs, 4, axis=1), weights))
    assert error(four, one) < 1e-12 and info.norms.max() > 1
    np.testing.assert_allclose(info4.norms, info.norms, rtol=1e-12)
    opposite = jnp.array([[[30.0, 40.0], [-30.6, -40.8]]])  # norms 50 and 51, their mean 0.5
    total, info = two_pass(lambda w, x: x @ w, 1.0)(jnp.zeros(2), opposite)
    np.testing.assert_allclose(total, [-0.3, -0.4], rtol=1e-4)
    np.testing.assert_allclose(info.norms, [0.5], rtol=1e-4)


def test_eight_devices_give_the_same_sum(float64):
    params, loss, examples = setup(*LAYERS["plain conv 3x3"], 2, examples=8)
    mask = jnp.arange(8) != 2
    want, _ = jax.jit(clipped_grad(loss, 1.0))(params, examples, mask)
    assert error(on_eight_devices(two_pass(loss, 1.0), params, examples, mask), want) < 1e-12


# 2. The same guarantee.


@pytest.mark.parametrize("statistics", [False, True], ids=["", "batch norm"])
@pytest.mark.parametrize("rescale", [False, True])
def test_neighbours_with_poisoned_examples_stay_within_the_sensitivity(rescale, statistics):
    params, loss, (inputs, labels) = convolutional(statistics)
    grad = two_pass(loss, 0.125, rescale_to_unit_norm=rescale)
    call = jax.jit(lambda examples, mask: grad(params, examples, mask)[0])
    assert grad.sensitivity == (1.0 if rescale else 0.125)
    everyone, reached = jnp.ones(4, bool), []
    for name, hostile in {"itself": lambda x: x, **HOSTILE}.items():
        changed = inputs.at[1].set(hostile(inputs[1])), labels
        with_it, without = call(changed, everyone), call(changed, everyone.at[1].set(False))
        assert np.isfinite(norm(with_it)), name
        reached.append(norm(jax.tree.map(np.subtract, with_it, without)))
        assert reached[-1] <= grad.sensitivity * (1 + 1e-5), name
        if name in ("inf", "nan", "one nan in one view"):
            assert reached[-1] == 0, name
    assert max(reached) > 0.999 * grad.sensitivity, "the bound is met, so the test has teeth"


def test_content_of_padding_never_matters(backend):  # noqa: F811
    params, loss, (inputs, labels) = convolutional()
    call = jax.jit(two_pass(loss, 0.1))
    check_padding_never_matters(call, params, inputs, labels)
    nobody, info = call(params, (inputs.at[1].set(jnp.nan), labels), jnp.zeros(4, bool))
    assert norm(nobody) == 0 and norm(info.norms) == 0
    none_finite, _ = call(params, (jnp.full_like(inputs, jnp.nan), labels), jnp.ones(4, bool))
    assert norm(none_finite) == 0


def test_losses_without_a_value_at_zero():
    """Whatever an unused example is replaced by, if by anything, must not reach the sum."""
    loss = lambda w, x: jnp.log(w @ x) + jnp.sqrt(x[0] * w[0])
    w = jnp.ones(2)
    usable, zeros = jnp.array([2.0, 3.0]), jnp.zeros(2)
    alone, _ = jax.jit(two_pass(loss, 0.1))(w, usable[None])
    both, info = jax.jit(two_pass(loss, 0.1))(w, jnp.stack([zeros, usable]))
    np.testing.assert_allclose(norm(alone), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(both, alone)
    assert not np.isfinite(info.norms[0])
    masked, _ = jax.jit(two_pass(loss, 0.1))(w, jnp.stack([zeros, usable]), jnp.array([False, True]))
    np.testing.assert_array_equal(masked, alone)
    assert norm(jax.jit(two_pass(loss, 0.1))(w, jnp.zeros((2, 2)))[0]) == 0


def opposite_views():
    """Eight examples, all of gradient (1, 1, 1, 1) / 2, the last with 1e10 and -1e10 on top of its views."""
    views = jnp.full((8, 2, 4), 0.5)
    return lambda w, x: x @ w, jnp.zeros(4), views.at[7].set(jnp.array([[1e10], [-1e10]]) * jnp.ones((2, 4)))


@both_forms
def test_an_example_of_cancelling_views_takes_nothing_from_the_others(form, backend):  # noqa: F811
    loss, w, views = opposite_views()
    call = jax.jit(clipped_grad(loss, 1.0, form=form))
    with_it, info = call(w, views)
    without, _ = call(w, views, jnp.arange(8) < 7)
    assert info.norms[7] == 0
    np.testing.assert_array_equal(with_it, without)
    np.testing.assert_allclose(with_it, jnp.full(4, 3.5), rtol=1e-6)


def test_an_ordinary_gradient_of_scaled_losses_would_break_the_guarantee():
    """Why the second pass clips example by example: seven gradients of norm 1 vanish with this one."""
    loss, w, views = opposite_views()
    scaled = jax.jit(jax.grad(lambda w, used: (used * jax.vmap(loss, (None, 0))(w, views).mean(1)).sum()))
    distance = norm(scaled(w, jnp.ones(8)) - scaled(w, jnp.ones(8).at[7].set(0)))
    assert distance > 2  # of a sensitivity of 1


@pytest.mark.parametrize("error_", [1000.0, float("nan"), float("inf"), 0.5])
def test_a_second_pass_that_computes_something_else_keeps_the_bound(error_, monkeypatch):
    """As if the passes rounded differently, and hugely: no longer than in the first, or nothing."""
    loss, w, examples = lambda w, x: w[0] @ x + w[1] @ x, jnp.zeros((2, 3)), jnp.eye(3) * 4
    want, _ = two_pass(loss, 1.0)(w, examples)
    exact = ClippedGrad._second_pass

    def wrong(self, *args):
        return exact(self, *args).at[1].multiply(error_)

    monkeypatch.setattr(ClippedGrad, "_second_pass", wrong)
    total, _ = two_pass(loss, 1.0)(w, examples)
    one = jnp.arange(3) == 1
    alone, _ = two_pass(loss, 1.0)(w, examples, one)
    assert norm(alone) <= 1 + 1e-6
    np.testing.assert_allclose(norm(alone), {1000.0: 1, 0.5: 0.5}.get(error_, 0), rtol=1e-6)
    np.testing.assert_array_equal(total[:, [0, 2]], want[:, [0, 2]])


@both_forms
def test_the_added_vector_is_no_longer_than_the_bound(form):
    """One clipped example of two million weights, measured in float64; the largest excess seen is 1e-7."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((2048, 1024)), jnp.float32) / 45
    call = jax.jit(clipped_grad(lambda w, x: jnp.sin(x @ w).sum(1), 1e-3, form=form))
    for content in (rng.standard_normal((1, 3, 2048)), np.full((1, 3, 2048), 0.1)):
        total, info = call(w, jnp.asarray(content, jnp.float32))
        assert info.norms[0] > 1
        np.testing.assert_allclose(np.linalg.norm(np.asarray(total, np.float64)), 1e-3, rtol=1e-6)


# 3. Half precision.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_are_clipped_and_summed_in_float32(dtype):
    """260 ones: a sum in bfloat16 stalls at 256, one in float16 of squares overflows at 65504."""
    ones = jnp.ones((260, 1), dtype)
    total, _ = jax.jit(two_pass(lambda w, x: w @ x, float("inf")))(jnp.zeros(1, dtype), ones)
    assert total.dtype == jnp.float32 and total[0] == 260
    total, info = jax.jit(two_pass(lambda w, x: w @ x, 1.0))(
        jnp.zeros(300, dtype), jnp.full((1, 300), 300, dtype)
    )
    np.testing.assert_allclose(info.norms, 300 * 300**0.5, rtol=1e-6)
    np.testing.assert_allclose(norm(total), 1, rtol=1e-6)


def test_half_precision_computation_keeps_the_guarantee(backend):  # noqa: F811
    """Rounded to bfloat16 are the gradients, never their norms, their clip or their sum."""
    params, apply = functional(Conv(3, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 5, 5, 3)), jnp.float32)

    def loss(params, x):
        return optax.softmax_cross_entropy_with_integer_labels(
            apply(params, x).mean((1, 2)), jnp.array([0, 1])
        )

    call = jax.jit(two_pass(loss, 0.01))
    want, _ = jax.jit(clipped_grad(loss, 0.01))(params, inputs)
    got, info = call(params, inputs)
    assert apply(params, inputs[0]).dtype == jnp.bfloat16 and info.norms.min() > 0.01
    assert {g.dtype for g in jax.tree.leaves((got, info.norms))} == {np.dtype("float32")}
    assert error(got, want) < 1e-5
    for hostile in HOSTILE.values():
        changed = inputs.at[2].set(hostile(inputs[2]))
        without, _ = call(params, changed, jnp.arange(6) != 2)
        distance = norm(jax.tree.map(np.subtract, call(params, changed)[0], without))
        assert distance <= 0.01 * (1 + 1e-5)
    alone, _ = call(params, inputs, jnp.arange(6) == 2)
    np.testing.assert_allclose(norm(alone), 0.01, rtol=1e-6)


# 4. Memory, as XLA plans it.


def dense():
    weights = [jax.ShapeDtypeStruct((256, 256), "float32")] * 12

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x.sum(1)

    return weights, loss, (4, 256)


def convolutions():
    conv = functools.partial(Conv, 128, 128, 1, standardised=False)
    model = nnx.eval_shape(lambda: nnx.List([conv(rngs=nnx.Rngs(0)) for _ in range(12)]))
    graph, params = nnx.split(model)

    def loss(params, x):
        for conv in nnx.merge(graph, params):
            x = jnp.tanh(conv(x))
        return x.mean((1, 2, 3))

    return params, loss, (1, 2, 2, 128)


def planned(network, examples, form, **options):
    """(bytes of temporaries, bytes of the gradients of all examples), in the integers of private training."""
    params, loss, view = network()
    inputs = jax.ShapeDtypeStruct((examples, *view), "float32")
    lowered = jax.jit(clipped_grad(loss, 1.0, form=form, grid_bits=16)).lower(params, inputs)
    memory = lowered.compile({"xla_backend_optimization_level": 0, **options}).memory_analysis()
    return memory.temp_size_in_bytes, 4 * examples * sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "share"), [(dense, 0.3), (convolutions, 0.65)])
@pytest.mark.parametrize("examples", [4, 16])
def test_gradients_of_all_examples_are_never_alive_together(network, share, examples):
    """Planned, as a share of all gradients: dense 0.26 and (16 examples) 0.18, convolutions 0.44 and 0.58."""
    kept, gradients_ = planned(network, examples, "materialised")
    twice, _ = planned(network, examples, "two-pass")
    assert kept > 0.8 * gradients_
    assert twice < share * gradients_


@pytest.mark.slow
def test_less_memory_is_planned_where_that_is_asked_of_xla():
    fast, _ = planned(convolutions, 8, "two-pass")
    small, _ = planned(
        convolutions, 8, "two-pass", xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    )
    assert small < 0.9 * fast


# 5. The choice.


def shapes(network, size):
    return nnx.state(nnx.eval_shape(lambda: network(size, rngs=nnx.Rngs(0))), nnx.Param)


def test_the_form_follows_from_the_memory():
    """25,557,048 parameters of NF-ResNet-50 are 97.5 MiB of gradient, 254,924,200 of NFNet-F3 972.5 MiB."""
    resnet, nfnet = shapes(NFResNet, 50), shapes(NFNet, "F3")
    form, why = choose_form(resnet, 8, 16 * 2**30)
    assert form == "materialised"
    assert why == (
        "gradients of 8 examples, 97.5 MiB each, take 779.9 MiB, at most 40 % of the 16.0 GiB of the device"
    )
    form, why = choose_form(nfnet, 8, 16 * 2**30)
    assert form == "two-pass"
    assert why == (
        "gradients of 8 examples, 972.5 MiB each, take 7.6 GiB, more than 40 % of the 16.0 GiB of the device"
    )
    assert choose_form(nfnet, 6, 16 * 2**30)[0] == choose_form(nfnet, 32, 80 * 2**30)[0] == "materialised"
    assert choose_form(resnet, 64, 8 * 2**30)[0] == "two-pass"


def test_the_choice_turns_at_40_per_cent_and_counts_float32():
    half = jax.ShapeDtypeStruct((1000,), jnp.bfloat16)  # its gradients are clipped in float32
    assert choose_form(half, 10, 100_000)[0] == "materialised"
    assert choose_form(half, 10, 99_999)[0] == choose_form(half, 1, 0)[0] == "two-pass"


def test_refusals_name_what_there_is():
    with pytest.raises(ValueError, match="form must be one of materialised, two-pass, got 'ghost'"):
        clipped_grad(jnp.dot, 1.0, form="ghost")
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        choose_form(jnp.ones(3), 0, 2**30)
