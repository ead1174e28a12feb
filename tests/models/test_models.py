"""The model zoo against an independent numpy version, and the check for mixed examples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dpnb.models import (
    DrawsRandomNumbers,
    MixesExamples,
    WideResNet,
    check_deterministic,
    check_independent,
    checks,
    functional,
)
from dpnb.models.layers import Conv, standardise

pytestmark = pytest.mark.usefixtures("strict_ranks")
# Most of the time here is compilation; this halves it.


def random_like(params, seed=0):
    """Every parameter random, so that none (gain 1, bias 0) hides in the result."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape) * 0.3 + (p.ndim == 1), params)


def abstract(depth=10, width=1, *args, **options):
    """The network without its numbers."""
    return nnx.eval_shape(lambda: WideResNet(depth, width, *args, rngs=nnx.Rngs(0), **options))


# The architecture.


@pytest.mark.parametrize(
    ("depth", "width", "classes", "parameters"),
    [
        (16, 4, 10, 2_753_818),
        (40, 4, 10, 8_961_306),
        (40, 4, 100, 8_984_436),
        (28, 10, 10, 36_500_378),
        (28, 10, 100, 36_558_068),
        (28, 10, 1000, 37_134_968),
    ],
)
def test_parameter_counts_of_the_paper(depth, width, classes, parameters):
    model = abstract(depth, width, classes)
    assert sum(p.size for p in jax.tree.leaves(nnx.state(model))) == parameters


@dataclasses.dataclass
class Plain:
    """The paper's Wide-ResNet once more, in numpy and loops; `p` is the nested parameter dict."""

    depth: int
    width: int

    def __call__(self, p, x):
        x = self.conv(p["stem"], x, 1)
        number = 0
        for multiple, stride in ((1, 1), (2, 2), (4, 2)):
            for i in range((self.depth - 4) // 6):
                b = p["blocks"][number]
                x = self.block(b, x, stride if i == 0 else 1, project=i == 0)
                assert x.shape[-1] == 16 * multiple * self.width
                number += 1
        assert number == len(p["blocks"])
        x = self.norm(p["norm"], np.maximum(x, 0)).mean((1, 2))
        return x @ p["linear"]["kernel"] + p["linear"]["bias"]

    def block(self, b, x, stride, project):
        assert ("skip_conv" in b) == ("skip_norm" in b) == project
        skip = x
        if project:
            skip = self.conv(b["skip_conv"], self.norm(b["skip_norm"], np.maximum(x, 0)), stride)
        y = self.conv(b["conv1"], self.norm(b["norm1"], np.maximum(x, 0)), stride)
        y = self.conv(b["conv2"], self.norm(b["norm2"], np.maximum(y, 0)), 1)
        return y + skip

    def norm(self, p, x):
        n, h, w, c = x.shape
        groups = x.reshape(n, h * w, 16, c // 16)
        centred = groups - groups.mean((1, 3), keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)
        return scaled.reshape(x.shape) * p["scale"] + p["bias"]

    def conv(self, p, x, stride):
        kernel = p["kernel"]
        fan_in = kernel[..., 0].size
        variance = kernel.var((0, 1, 2))
        kernel = (kernel - kernel.mean((0, 1, 2))) * p["gain"] / np.sqrt(np.maximum(variance * fan_in, 1e-4))
        size = kernel.shape[0]
        out = [-(-n // stride) for n in x.shape[1:3]]
        # 'SAME': what is missing, the smaller half in front.
        missing = [max(0, (o - 1) * stride + size - n) for o, n in zip(out, x.shape[1:3], strict=True)]
        x = np.pad(x, [(0, 0), *[(m // 2, m - m // 2) for m in missing], (0, 0)])
        y = np.zeros((len(x), *out, kernel.shape[-1]))
        for i in range(size):
            for j in range(size):
                window = x[:, i:, j:][:, ::stride, ::stride][:, : out[0], : out[1]]
                y += window @ kernel[i, j]
        return y + p["bias"]


@pytest.mark.parametrize(("depth", "width", "size"), [(10, 1, 8), (16, 2, 7)])
def test_forward_matches_the_architecture_of_the_paper(depth, width, size, float64):
    params, apply = functional(abstract(depth, width))
    params = random_like(params)
    x = np.random.default_rng(1).standard_normal((2, size, size, 3))
    want = Plain(depth, width)(params, x)
    got = jax.jit(apply)(params, x)
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_depth_must_fit():
    for depth in (4, 18, 20):
        with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 4 .* got {depth}"):
            WideResNet(depth, 1, rngs=nnx.Rngs(0))


def test_other_norms():
    layer_norm = lambda features: nnx.LayerNorm(features, rngs=nnx.Rngs(0))
    model = abstract(norm=layer_norm)
    assert isinstance(model.norm, nnx.LayerNorm) and isinstance(model.blocks[0].skip_norm, nnx.LayerNorm)


def test_bfloat16_computation_keeps_float32_parameters_and_logits():
    params, apply = functional(abstract())
    same, apply_half = functional(half := abstract(dtype=jnp.bfloat16))
    assert same == params and {p.dtype for p in jax.tree.leaves(same)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda p: p.astype(np.float32), random_like(params))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    want, got = jax.jit(apply)(params, x), jax.jit(apply_half)(params, x)
    assert half.stem.dtype == jnp.bfloat16 and got.dtype == jnp.float32
    assert 0 < np.abs(got - want).max() < 0.05 * np.abs(want).max()


# Weight standardisation.


def plain_standardise(kernel, gain):
    mean, variance = kernel.mean((0, 1, 2), keepdims=True), kernel.var((0, 1, 2), keepdims=True)
    fan_in = kernel[..., 0].size
    return (kernel - mean) * gain[None, None, None] / jnp.sqrt(jnp.maximum(variance * fan_in, 1e-4))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_standardise_and_its_gradient(backend, float64, trace_for):
    """Alone, per example, and for an ensemble of kernels; with a channel below the floor."""
    trace_for(backend)
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.standard_normal((2, 3, 3, 4, 5))).at[..., 1].multiply(1e-4)
    gain, cotangents = jnp.asarray(rng.standard_normal(5)), rng.standard_normal((3, 3, 3, 4, 5))

    def loss(f, kernel, gain, cotangent):
        return (jnp.sin(f(kernel, gain)) * cotangent).sum()

    def grads(f):
        one = jax.grad(functools.partial(loss, f), (0, 1))
        per_example = jax.vmap(one, (None, None, 0))
        ensemble = jax.vmap(per_example, (0, None, None))
        return (
            f(kernels[0], gain),
            one(kernels[0], gain, cotangents[0]),
            per_example(kernels[0], gain, cotangents),
            ensemble(kernels, gain, cotangents),
        )

    got, want = jax.jit(lambda: (grads(standardise), grads(plain_standardise)))()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), got, want)


@pytest.mark.slow
def test_standardised_kernels_have_the_stated_moments():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 5)) * 7 + 2
    gain = jnp.arange(1.0, 6)
    w = standardise(kernel, gain)
    np.testing.assert_allclose(w.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(w.var((0, 1, 2)), gain**2 / 72, rtol=1e-5)


# Initial parameters.


def test_initial_parameters():
    """Kernels are Normal(0, 1 / fan_in), untruncated; the classifier is truncated at two deviations.

    Each statistic may be off by five of its own standard deviations: with another seed, a
    false alarm once in a million runs.
    """
    conv = Conv(64, 64, 3, rngs=nnx.Rngs(0))
    z = np.asarray(conv.kernel[...], np.float64).ravel() * np.sqrt(9 * 64)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / z.size), "a truncated normal has 2.1 to 2.5"
    assert (conv.gain[...] == 1).all() and (conv.bias[...] == 0).all()
    linear = WideResNet(10, 1, 40, rngs=nnx.Rngs(0)).linear
    z = np.asarray(linear.kernel[...], np.float64).ravel() * np.sqrt(64)
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
    assert 2 < np.abs(z).max() < 2 / 0.8796 + 1e-6
    assert (linear.bias[...] == 0).all()


# Models as functions.


class Stateful(nnx.Module):
    """Running statistics and dropout: state that moves with every call."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


def test_functional_drops_changes_of_state():
    model = Stateful(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    params, apply = functional(model)
    assert params.keys() == {"norm"} and params["norm"].keys() == {"scale", "bias"}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
    per_example = jax.vmap(jax.grad(lambda p, x: apply(p, x[None]).sum()), (None, 0))
    jax.jit(per_example)(params, x)
    first, second, jitted = apply(params, x), apply(params, x), jax.jit(apply)(params, x)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, jitted, rtol=1e-6)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_functional_follows_its_parameters():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params, apply = functional(model)
    x = jnp.ones((1, 3))
    np.testing.assert_array_equal(apply(params, x), model(x))
    doubled = jax.tree.map(lambda p: 2 * p, params)
    np.testing.assert_allclose(apply(doubled, x), 2 * model(x), rtol=1e-6)


# Models that mix examples.


class Centred(nnx.Module):
    def __init__(self, amount=1.0):
        self.amount = amount

    def __call__(self, x):
        return x - self.amount * x.mean(0, keepdims=True)


class Counter(nnx.Module):
    """Treats examples on their own, but remembers the last batch."""

    def __init__(self):
        self.seen = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.seen[...] = x.sum()
        return x


class Averaged(nnx.Module):
    def __call__(self, x):
        return x.mean()


class Neighbour(nnx.Module):
    """Only in training, and only from one example to the next."""

    deterministic = False

    def __call__(self, x):
        return x if self.deterministic else x + jnp.roll(x, 1, 0).astype(x.dtype)


class Examined(nnx.Module):
    """Only in evaluation."""

    deterministic = False

    def __call__(self, x):
        return x + jnp.roll(x, 1, 0) if self.deterministic else x


class Told(nnx.Module):
    """Only in evaluation, of which it keeps a note that flax does not look into."""

    def __init__(self):
        self.told = set()

    def eval(self, **attributes):
        self.told.add("evaluation")

    def __call__(self, x):
        return x + jnp.roll(x, 1, 0) if self.told else x


class Overheard(nnx.Module):
    """Only in evaluation, which it hears of in ways of its own."""

    def __init__(self):
        self.told = set()

    def set_attributes(self, *filters, deterministic, **attributes):
        self.told.update(["evaluation"] * deterministic)

    def __call__(self, x):
        return x + jnp.roll(x, 1, 0) if self.told else x


FEATURES = jax.random.normal(jax.random.key(0), (3, 5, 4))


@pytest.mark.parametrize("evaluating", [False, True])
def test_batch_norm_is_caught(evaluating):
    model = nnx.BatchNorm(4, use_running_average=evaluating, rngs=nnx.Rngs(0))
    with pytest.raises(MixesExamples, match="in train mode the output of example 1 moved when example 0"):
        check_independent(model, FEATURES)
    assert model.use_running_average == evaluating and (model.mean[...] == 0).all(), "it worked on a copy"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Centred(), "example 1 moved when example 0 was replaced"),
        (Centred(1e-30), "example 1 moved when example 0 was replaced"),
        (Counter(), r"in train mode it changed \['seen'\]"),
        (Averaged(), "must keep the examples axis"),
        (Neighbour(), "in train mode the output of example 1 moved"),
    ],
    ids=["centred", "slightly", "remembers", "averaged", "neighbour"],
)
def test_other_mixing_is_caught(model, message):
    with pytest.raises(MixesExamples, match=message):
        check_independent(model, FEATURES)


@pytest.mark.parametrize(
    "model",
    [Examined, Told, Overheard, lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), Examined())],
)
def test_mixing_in_evaluation_alone_is_caught(model):
    with pytest.raises(MixesExamples, match="in eval mode the output of example 1 moved"):
        check_independent(model(), FEATURES)


def test_the_second_mode_is_checked_only_if_it_is_another_program(monkeypatch):
    modes, check = [], checks._check
    monkeypatch.setattr(checks, "_check", lambda *given: modes.append(given[3]) or check(*given))
    for model in (nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.0, rngs=nnx.Rngs(0))):
        modes.clear()
        check_independent(model, FEATURES)
        assert modes == ["train"]
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    for model in (drop, nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), drop)):
        modes.clear()
        check_independent(model, FEATURES)
        assert modes == ["train", "eval"]


class Concrete(nnx.Module):
    """What a call does depends on values that it holds, which must not be arguments of its program."""

    def __init__(self):
        self.kept, self.shape = np.array([True, False, True, True]), np.array([5, 3])
        self.times, self.doubled = nnx.Variable(2), nnx.Variable(jnp.array(True))
        self.mask = nnx.Variable(jnp.array([True, True, False]))
        self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = x[..., self.kept].reshape(len(x), *self.shape)
        for _ in range(self.times.get_value()):
            x = self.layer(x)
        return (2 * x if self.doubled[...] else x)[..., self.mask[...]]


def test_models_that_need_values_while_they_are_traced_pass():
    check_deterministic(Concrete(), FEATURES)
    check_independent(Concrete(), FEATURES)


def test_parameters_may_lie_on_several_devices():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    for layer, device in zip(model.layers, jax.devices(), strict=False):
        layer.kernel[...] = jax.device_put(layer.kernel[...], device)
    check_deterministic(model, FEATURES)
    check_independent(model, FEATURES)


def test_mixing_of_integers_is_caught():
    tokens = jnp.array([[1, 2], [0, 3], [2, 2]])
    check_independent(nnx.Embed(4, 3, rngs=nnx.Rngs(0)), tokens)
    with pytest.raises(MixesExamples):
        check_independent(Neighbour(), tokens)


def test_a_network_with_one_batch_norm_is_caught():
    def norm(features):
        if features == 64:
            return nnx.BatchNorm(features, rngs=nnx.Rngs(0))
        return nnx.GroupNorm(features, 16, rngs=nnx.Rngs(0))

    model = WideResNet(10, 1, norm=norm, rngs=nnx.Rngs(0))
    with pytest.raises(MixesExamples):
        check_independent(model, jax.random.normal(jax.random.key(0), (2, 8, 8, 3)))


def test_the_zoo_passes():
    check_independent(WideResNet(10, 1, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (3, 8, 8, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda r: nnx.Dropout(0.5, rngs=r),
        lambda r: nnx.LayerNorm(4, rngs=r),
        lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r),
        lambda r: nnx.Conv(4, 2, (3,), rngs=r),
    ],
    ids=["dropout", "layer norm", "attention", "conv"],
)
def test_independent_layers_pass(make):
    check_independent(make(nnx.Rngs(0)), FEATURES)


def test_random_streams_that_move_are_caught():
    """Also those that the layer does not use in the end; not one that is only there, or is switched off."""

    class Drawing(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(params=0, noise=1)

        def __call__(self, x):
            return x + 0 * jax.random.normal(self.rngs.noise(), x.shape)

    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    for model in (Drawing(), drop):
        with pytest.raises(DrawsRandomNumbers, match="moved the random stream .*count"):
            check_deterministic(model, FEATURES)

    class Making(nnx.Module):
        """Without a stream before the call."""

        def __call__(self, x):
            self.rngs = nnx.Rngs(noise=1)
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    with pytest.raises(DrawsRandomNumbers, match="moved the random stream .*count"):
        check_deterministic(Making(), FEATURES)
    drop.eval()
    for model in (drop, nnx.Dropout(0.0, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)), Centred()):
        check_deterministic(model, FEATURES)


def test_the_check_needs_something_to_see():
    for inputs in (FEATURES[:1], jnp.ones((3, 4))):
        with pytest.raises(ValueError, match="at least two examples that differ"):
            check_independent(Centred(), inputs)
    with pytest.raises(ValueError, match="must be finite before"):
        check_independent(Centred(), FEATURES.at[0, 0, 0].set(jnp.inf))
