"""NFNets and NF-ResNets of others: every leaf finds its place, and the outputs are theirs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save

from dpnb.models import NFNet, NFResNet, functional, nf_resnet, nfnet
from dpnb.models.weights import catalogue as pretrained
from dpnb.models.weights import conversion
from dpnb.models.weights.__main__ import main
from dpnb.results import flatten
from dpnb.results.verification import unflatten

DEPTHS, WIDTH, CLASSES = (1, 2, 1, 1), 0.125, 5
IMAGES = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)


def ours(make):
    params, apply = functional(make(DEPTHS, CLASSES, width=WIDTH, rngs=nnx.Rngs(0)))
    return params, jax.jit(apply)


def randomised(shapes, seed=0):
    """Random leaves of the given shapes, around one for gains; one kernel in four has a tiny variance."""
    rng, made = np.random.default_rng(seed), {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        kernel = len(shape) > 1 and "gain" not in name
        scale = (1e-4 if i % 4 == 0 else 0.2) if kernel else 0.3
        made[name] = (rng.normal(0 if kernel or "bias" in name else 1, scale, shape)).astype(np.float32)
    return made


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * float(np.abs(want).max()))


# Haiku: the authors' NFNets.


def haiku_nfnet():
    """(init, apply) of the network as it is described by Brock et al., written with Haiku."""
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed: outputs are not compared")

    class Conv(hk.Conv2D):
        def __call__(self, x):
            shape = (*self.kernel_shape, x.shape[-1] // self.feature_group_count, self.output_channels)
            w = hk.get_parameter("w", shape, init=hk.initializers.RandomNormal())
            gain, bias = (hk.get_parameter(k, shape[-1:], init=jnp.ones) for k in ("gain", "bias"))
            scale = gain / jnp.sqrt(jnp.maximum(w.var((0, 1, 2)) * np.prod(shape[:-1]), 1e-4))
            return bias + jax.lax.conv_general_dilated(
                x, (w - w.mean((0, 1, 2))) * scale, self.stride, "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.feature_group_count,
            )  # fmt: skip

    def gelu(x):
        return 1.7015043497085571 * jax.nn.gelu(x)

    class SqueezeExcite(hk.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc0, self.fc1 = hk.Linear(channels // 2), hk.Linear(channels)

        def __call__(self, x):
            return jax.nn.sigmoid(self.fc1(jax.nn.relu(self.fc0(x.mean((1, 2))))))[:, None, None]

    class NFBlock(hk.Module):
        def __init__(self, cin, cout, stride, beta):
            super().__init__()
            group, self.stride, self.beta = int(128 * WIDTH), stride, beta
            groups = cout // 2 // group
            conv = functools.partial(Conv, cout // 2)
            self.conv0, self.conv1 = (
                conv(1, name="conv0"),
                conv(3, stride=stride, feature_group_count=groups, name="conv1"),
            )
            self.conv1b = conv(3, feature_group_count=groups, name="conv1b")
            self.conv2 = Conv(cout, 1, name="conv2")
            self.shortcut = Conv(cout, 1, name="conv_shortcut") if stride > 1 or cin != cout else None
            self.se = SqueezeExcite(cout)

        def __call__(self, x):
            out, skip = gelu(x) * self.beta, x
            if self.shortcut is not None:
                window = (1, self.stride, self.stride, 1)
                skip = self.shortcut(hk.avg_pool(out, window, window, "SAME") if self.stride > 1 else out)
            out = self.conv1b(gelu(self.conv1(gelu(self.conv0(out)))))
            out = self.conv2(gelu(out))
            out = 2 * self.se(out) * out * hk.get_parameter("skip_gain", (), init=jnp.zeros)
            return out * 0.2 + skip

    class Net(hk.Module):
        def __init__(self):
            super().__init__(name="NFNet")
            sizes = zip((16, 32, 64, 128), (2, 1, 1, 2), strict=True)
            self.stem = [
                Conv(int(c * WIDTH), 3, stride=s, name=f"stem_conv{i}") for i, (c, s) in enumerate(sizes)
            ]
            self.blocks, cin, std = [], int(128 * WIDTH), 1.0
            for stage, (channels, depth) in enumerate(zip((256, 512, 1536, 1536), DEPTHS, strict=True)):
                for i in range(depth):
                    cout = int(channels * WIDTH)
                    self.blocks.append(NFBlock(cin, cout, 2 if stage and i == 0 else 1, 1 / std))
                    cin, std = cout, ((1.0 if i == 0 else std) ** 2 + 0.2**2) ** 0.5
            self.final, self.fc = Conv(2 * cin, 1, name="final_conv"), hk.Linear(CLASSES)

        def __call__(self, x):
            x = self.stem[0](x)
            for conv in self.stem[1:]:
                x = conv(gelu(x))
            for block in self.blocks:
                x = block(x)
            return self.fc(gelu(self.final(x)).mean((1, 2)))

    network = hk.without_apply_rng(hk.transform(lambda x: Net()(x)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
    flat = {f"{name}|{leaf}": x.shape for name, leaves in shapes.items() for leaf, x in leaves.items()}
    params = {}
    for key, array in randomised(flat).items():
        name, leaf = key.split("|")
        params.setdefault(name, {})[leaf] = array
    return params, network.apply


@pytest.mark.slow
def test_nfnet_from_haiku_has_equal_outputs():
    theirs, apply = haiku_nfnet()
    assert "NFNet/~/nf_block_1/~/conv1b" in theirs and "NFNet/~/linear" in theirs
    params, own = ours(NFNet)
    made = conversion.nfnet_from_haiku(theirs, DEPTHS)
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in flatten(params).items()}
    close(own(unflatten(made, params), IMAGES), jax.jit(apply)(theirs, IMAGES))


def test_an_orbax_checkpoint_is_read(tmp_path, monkeypatch):
    import orbax.checkpoint

    theirs, _ = haiku_nfnet()
    orbax.checkpoint.PyTreeCheckpointer().save(
        tmp_path / "nfnet", {"params": theirs, "state": {"n": np.ones(2)}}
    )
    monkeypatch.setitem(nfnet.DEPTHS, "F0", DEPTHS)
    made = pretrained.convert(tmp_path / "nfnet", pretrained.WEIGHTS["nfnet-f0-imagenet21k"])
    want = conversion.nfnet_from_haiku(theirs, DEPTHS)
    assert set(made) == set(want) and all(np.array_equal(made[k], want[k]) for k in want)
    with pytest.raises(ValueError, match="Orbax checkpoint is a directory"):
        pretrained.convert(tmp_path / "nothing", pretrained.WEIGHTS["nfnet-f0-imagenet21k"])


# timm: names and shapes written out from its state dictionaries.


def timm_shapes(kind):
    shapes, cin = {}, int((128 if kind == "nfnet" else 64) * WIDTH)

    def conv(name, size, before, after, groups=1):
        shapes.update({f"{name}.weight": (after, before // groups, size, size), f"{name}.bias": (after,)})
        shapes[f"{name}.gain"] = (after, 1, 1, 1)

    if kind == "nfnet":
        before = 3
        for i, channels in enumerate((16, 32, 64, 128), 1):
            conv(f"stem.conv{i}", 3, before, int(channels * WIDTH))
            before = int(channels * WIDTH)
    else:
        conv("stem.conv", 7, 3, cin)
    for stage, depth in enumerate(DEPTHS):
        cout = int((nfnet.WIDTHS if kind == "nfnet" else nf_resnet.WIDTHS)[stage] * WIDTH)
        middle = cout // (2 if kind == "nfnet" else 4)
        groups = middle // int(128 * WIDTH) if kind == "nfnet" else 1
        for i in range(depth):
            block = f"stages.{stage}.{i}"
            conv(f"{block}.conv1", 1, cin, middle)
            conv(f"{block}.conv2", 3, middle, middle, groups)
            conv(f"{block}.conv3", 1, middle, cout)
            if i == 0:
                conv(f"{block}.downsample.conv", 1, cin, cout)
            if kind == "nfnet":
                conv(f"{block}.conv2b", 3, middle, middle, groups)
                shapes[f"{block}.skipinit_gain"] = ()
                for n, (a, b) in enumerate(((cout, cout // 2), (cout // 2, cout)), 1):
                    shapes[f"{block}.attn_last.fc{n}.weight"] = (b, a, 1, 1)
                    shapes[f"{block}.attn_last.fc{n}.bias"] = (b,)
            cin = cout
    if kind == "nfnet":
        conv("final_conv", 1, cin, 2 * cin)
        cin *= 2
    shapes.update({"head.fc.weight": (CLASSES, cin), "head.fc.bias": (CLASSES,)})
    return shapes


TIMM = {
    "nfnet": (conversion.nfnet_from_timm, NFNet),
    "resnet": (conversion.nf_resnet_from_timm, functools.partial(NFResNet, published_by="timm")),
}
both = pytest.mark.parametrize("kind", TIMM)


@both
def test_every_leaf_of_timm_has_a_place_and_comes_once(kind):
    convert, make = TIMM[kind]
    state = randomised(timm_shapes(kind))
    params, _ = ours(make)
    made = convert(state, DEPTHS)
    expected = {k: (v.shape, np.dtype("float32")) for k, v in flatten(params).items()}
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == expected
    biases = sorted(float(v.sum()) for k, v in state.items() if k.endswith(".bias"))  # not changed on the way
    assert sorted(float(v.sum()) for k, v in made.items() if k.endswith("/bias")) == biases
    for change in ({"stages.9.0.conv1.weight": np.ones(1)}, {"stages.3.0.conv1.weight": None}):
        wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(ValueError, match="the file must hold a NF"):
            convert(wrong, DEPTHS)


def test_a_timm_file_is_converted_by_name(tmp_path, monkeypatch):
    state = randomised(timm_shapes("resnet"))
    monkeypatch.setitem(nf_resnet.DEPTHS, 50, DEPTHS)
    (tmp_path / "model.safetensors").write_bytes(save(state))
    out = tmp_path / "out.safetensors"
    arguments = ["convert", "nf-resnet-50-imagenet", str(tmp_path / "model.safetensors"), str(out)]
    assert main(arguments) == 0
    made, want = pretrained.load(out), conversion.nf_resnet_from_timm(state, DEPTHS)
    assert set(made) == set(want) and all(np.array_equal(made[k], want[k]) for k in want)
    assert "imagenet2012" in pretrained.saw(out)


@both
def test_outputs_are_those_of_timm(kind):
    """Padding, pooling, gains and the constant of the standardisation, at an even and an odd size."""
    try:
        import torch
        from timm.models import nfnet as theirs
    except Exception as error:  # absent, or without a torchvision that fits
        pytest.skip(f"timm is not installed here ({type(error).__name__}): outputs are not compared")
    channels = nfnet.WIDTHS if kind == "nfnet" else nf_resnet.WIDTHS
    channels = tuple(int(c * WIDTH) for c in channels)
    if kind == "nfnet":
        config = dataclasses.replace(
            theirs._dm_nfnet_cfg(DEPTHS, channels), group_size=int(128 * WIDTH), stem_chs=16
        )
    else:
        config = dataclasses.replace(theirs._nfres_cfg(DEPTHS, channels), stem_chs=8)
    network = theirs.NormFreeNet(config, num_classes=CLASSES).eval()
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert shapes == timm_shapes(kind)
    state = randomised(shapes)
    network.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    for module in network.modules():  # the usual approximation, as in DeepMind's
        if hasattr(module, "act_fn") and kind == "nfnet":
            module.act_fn = lambda x, inplace=False: torch.nn.functional.gelu(x, approximate="tanh")
    convert, make = TIMM[kind]
    params, own = ours(make)
    params = unflatten(convert(state, DEPTHS), params)
    for images in (IMAGES, IMAGES[:, :57, :57]):
        with torch.no_grad():
            want = network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        close(own(params, images), want)
