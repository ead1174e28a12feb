"""Published weights: every leaf finds its place, outputs are equal, and nothing unknown is trusted."""

import hashlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save

from dpnb.models import NFResNet, PatchLinear, WideResNet, functional
from dpnb.models.weights import catalogue as pretrained
from dpnb.models.weights.__main__ import main
from dpnb.results import flatten
from dpnb.results.verification import unflatten

DEPTH, WIDTH, CLASSES = 16, 1, 7
WEIGHTS = pretrained.Weights("", "haiku", "ours", f"wrn-{DEPTH}-{WIDTH}", CLASSES, "nothing", "random")


def leaves(depth=DEPTH):
    """Their names and shapes, written out from the description of the network; every value random."""
    rng, made = np.random.default_rng(0), {}

    def conv(name, size, cin, cout):
        shapes = {"w": (size, size, cin, cout), "gain": (cout,), "bias": (cout,)}
        made[f"wide_res_net/{name}"] = {k: rng.normal(1, 0.3, s).astype("f4") for k, s in shapes.items()}

    def norm(name, channels):
        made[f"wide_res_net/{name}"] = {
            k: rng.normal(1, 0.3, channels).astype("f4") for k in ("scale", "offset")
        }

    conv("First_conv", 3, 3, 16)
    before = 16
    for stage, channels in enumerate((16 * WIDTH, 32 * WIDTH, 64 * WIDTH), 1):
        norm(f"Block_{stage}_skip_norm", before)
        conv(f"Block_{stage}_skip_conv", 1, before, channels)
        for i in range((depth - 4) // 6):
            for j in range(2):
                norm(f"Block_{stage}_norm_{i}_{j}", before)
                conv(f"Block_{stage}Conv_{i}_{j}", 3, before, channels)
                before = channels
    norm("Final_norm", before)
    made["wide_res_net/Softmax"] = {"w": rng.normal(size=(before, CLASSES)), "b": rng.normal(size=CLASSES)}
    return made


def published(params):
    return pickle.dumps({"params": params, "network_state": {}}, 4)


def ours():
    params, apply = functional(WideResNet(DEPTH, WIDTH, CLASSES, rngs=nnx.Rngs(0)))
    return params, apply


def test_every_leaf_has_a_place_and_comes_once():
    theirs, (params, _) = leaves(), ours()
    made = pretrained.convert(published(theirs), WEIGHTS)
    expected = {k: (v.shape, v.dtype) for k, v in flatten(params).items()}
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == expected
    sums = sorted(float(np.float32(v).sum()) for layer in theirs.values() for v in layer.values())
    assert sorted(float(v.sum()) for v in made.values()) == sums  # random, so all different
    assert len(set(sums)) == len(sums)
    for ours_, theirs_ in {"blocks/1/conv2/kernel": ("Block_1Conv_1_1", "w"), "stem/gain": ("First_conv", "gain"),
                           "blocks/2/skip_norm/bias": ("Block_2_skip_norm", "offset")}.items():  # fmt: skip
        np.testing.assert_array_equal(made[ours_], theirs["wide_res_net/" + theirs_[0]][theirs_[1]])


def test_names_and_shapes_of_the_first_release():
    """Its names have ~conv_fn/ and ~norm_fn/ in them; old norms keep singleton axes."""

    def old(name, layer):
        kind = "~norm_fn/" if "offset" in layer else "~conv_fn/" if "gain" in layer else ""
        wide = {k: v.reshape(1, 1, 1, -1) if kind == "~norm_fn/" else v for k, v in layer.items()}
        return name.replace("wide_res_net/", f"wide_res_net/{kind}"), wide

    new = pretrained.convert(published(leaves()), WEIGHTS)
    made = pretrained.convert(published(dict(old(k, v) for k, v in leaves().items())), WEIGHTS)
    assert list(made) == list(new) and all((made[k] == new[k]).all() for k in new)


@pytest.mark.slow
def test_equal_outputs_in_haiku():
    """The same numbers in a network written with Haiku, from the published description of it."""
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed: outputs are not compared")

    class Conv(hk.Conv2D):
        def __call__(self, x):
            w = hk.get_parameter("w", (*self.kernel_shape, x.shape[-1], self.output_channels), init=jnp.ones)
            gain, bias = (hk.get_parameter(k, w.shape[-1:], init=jnp.ones) for k in ("gain", "bias"))
            axes, fan_in = (0, 1, 2), w.size // w.shape[-1]
            scale = gain / jnp.sqrt(jnp.maximum(w.var(axes) * fan_in, 1e-4))
            w = (w - w.mean(axes)) * scale
            return bias + jax.lax.conv_general_dilated(
                x, w, self.stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

    def network(x):
        act = lambda x, name: hk.GroupNorm(16, name=name)(jax.nn.relu(x))
        x = Conv(16, 3, name="First_conv")(x)
        for stage, channels in enumerate((16, 32, 64), 1):
            for i in range(2):
                stride, skip = 2 if stage > 1 and i == 0 else 1, x
                if i == 0:
                    block = f"Block_{stage}"
                    skip = Conv(channels, 1, stride, name=f"{block}_skip_conv")(act(x, f"{block}_skip_norm"))
                for j in range(2):
                    x = act(x, f"{block}_norm_{i}_{j}")
                    x = Conv(channels, 3, stride if j == 0 else 1, name=f"{block}Conv_{i}_{j}")(x)
                x = x + skip
        return hk.Linear(CLASSES, name="Softmax")(act(x, "Final_norm").mean((1, 2)))

    images = jax.random.normal(jax.random.key(1), (3, 32, 32, 3))
    theirs = {k.removeprefix("wide_res_net/"): v for k, v in leaves().items()}
    want = hk.without_apply_rng(hk.transform(network)).apply(theirs, images)
    params, apply = ours()
    got = apply(unflatten(pretrained.convert(published(leaves()), WEIGHTS), params), images)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * float(jnp.abs(want).max()))


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="Wide-ResNet of depth 16.*Block_1"):
        pretrained.convert(published(leaves(10)), WEIGHTS)
    with pytest.raises(ValueError, match="beyond it"):
        pretrained.convert(published(leaves(22)), WEIGHTS)
    more = leaves()
    more["wide_res_net/First_conv"]["running_mean"] = np.zeros(16)
    with pytest.raises(ValueError, match="First_conv"):
        pretrained.convert(published(more), WEIGHTS)
    with pytest.raises(ValueError, match="params"):
        pretrained.convert(pickle.dumps([1], 4), WEIGHTS)


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A name whose source is a file here; its hash is that of the honest conversion."""
    (tmp_path / "theirs.dill").write_bytes(published(leaves()))
    made = pretrained.convert(tmp_path / "theirs.dill", WEIGHTS)
    sha256 = hashlib.sha256(save(made, {"saw": "nothing"})).hexdigest()
    url = (tmp_path / "theirs.dill").as_uri()
    changes = dict(url=url, sha256=sha256)
    monkeypatch.setitem(pretrained.WEIGHTS, "test", pretrained.dataclasses.replace(WEIGHTS, **changes))
    return made, tmp_path


def test_named_weights_are_converted_once_and_kept(named):
    made, folder = named
    got = pretrained.load("test", folder / "cache")
    (folder / "theirs.dill").unlink()  # now offline
    again = pretrained.load("test", folder / "cache")
    path = pretrained.load(folder / "cache" / "test.safetensors")
    for x in (got, again, path):
        assert set(x) == set(made) and all((x[k] == made[k]).all() for k in made)


def test_offline_and_wrong_files_leave_nothing_behind(named):
    _, folder = named
    cache = folder / "cache"
    changed = leaves()
    changed["wide_res_net/Softmax"]["b"][0] += 1
    for content, error in ((published(changed), "SHA-256"), (published(leaves())[:-100], "pickle"),
                           (pickle.dumps({"params": print}, 4), "asks for builtins.print")):  # fmt: skip
        (folder / "theirs.dill").write_bytes(content)
        with pytest.raises(ValueError, match=error):
            pretrained.load("test", cache)
    (folder / "theirs.dill").unlink()
    with pytest.raises(OSError, match="cannot be reached.*local path"):
        pretrained.load("test", cache)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_changed_cache_is_refused(named):
    _, folder = named
    pretrained.load("test", folder)
    kept = folder / "test.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="SHA-256"):
        pretrained.load("test", folder)


@pytest.mark.parametrize("name", pretrained.WEIGHTS)
def test_nothing_is_trusted_on_first_use(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.urllib.request, "urlopen", lambda *_: pytest.fail("asked the network"))
    w = pretrained.WEIGHTS[name]
    assert w.licence and w.saw and w.url.startswith(("https://", "gs://")) or w.sha256
    if w.sha256 is None:
        with pytest.raises(ValueError, match="trusted on first use"):
            pretrained.load(name, tmp_path)
    with pytest.raises(KeyError, match="wrn-40-4-cifar100"):
        pretrained.load("wrn-40-4-cifar10", tmp_path)


def test_command_line(named, capsys, monkeypatch):
    made, folder = named
    arguments = ["convert", "test", str(folder / "theirs.dill"), str(folder / "out.safetensors")]
    assert main(arguments) == 0 and pretrained.WEIGHTS["test"].sha256 in capsys.readouterr().out
    assert set(load_file(folder / "out.safetensors")) == set(made)
    assert pretrained.saw(folder / "out.safetensors") == "nothing"
    (folder / "theirs.dill").write_bytes(b"nothing")
    assert main([*arguments[:3], str(folder / "other.safetensors")]) == 2
    assert not (folder / "other.safetensors").exists() and "pickle" in capsys.readouterr().err
    assert main(["list"]) == 0 and "CC BY 4.0" in capsys.readouterr().out


def test_ours_come_with_dpnb_and_with_their_hash(tmp_path, monkeypatch):
    ours_ = {name: weights for name, weights in pretrained.WEIGHTS.items() if not weights.url}
    assert "wrn-10-2-tiny-imagenet32" in ours_
    for name, weights in ours_.items():
        if weights.network == "nf-resnet-14":  # a quarter as wide
            model = NFResNet(14, weights.num_classes, width=0.25, rngs=nnx.Rngs(0))
        elif weights.network == "patch-linear":  # whose linear layer nothing has trained
            model = PatchLinear(rngs=nnx.Rngs(0))
            del model.linear
        else:
            model = WideResNet(*weights.shape, weights.num_classes, rngs=nnx.Rngs(0))
        params, _ = functional(model)
        made = pretrained.load(name)
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in flatten(params).items()}
        assert len(pretrained.identity(made)) == 64
    monkeypatch.setattr(pretrained, "OURS", tmp_path)
    with pytest.raises(FileNotFoundError, match="comes with dpnb, and there is no"):
        pretrained.load(name)
    (tmp_path / f"{name}.safetensors").write_bytes(save({"x": np.zeros(3)}))
    with pytest.raises(ValueError, match="SHA-256 must be"):
        pretrained.load(name)


def test_half_precision_keeps_what_the_weights_saw(tmp_path):
    arrays = {"a": np.linspace(-3, 3, 8, dtype=np.float32)}
    (tmp_path / "full.safetensors").write_bytes(save(arrays, {"saw": "a public set"}))
    assert main(["pack", str(tmp_path / "full.safetensors"), str(tmp_path / "half.safetensors")]) == 0
    half = pretrained.load(tmp_path / "half.safetensors")
    assert half["a"].dtype == np.float16 and pretrained.saw(tmp_path / "half.safetensors") == "a public set"
    np.testing.assert_allclose(half["a"], arrays["a"], rtol=1e-3)
    assert pretrained.identity(half) != pretrained.identity(arrays)
    assert pretrained.identity(half) == pretrained.identity({"a": half["a"].astype("f4")})


def test_half_precision_has_an_end(tmp_path):
    (tmp_path / "large.safetensors").write_bytes(save({"a": np.float32([1e6])}))
    with pytest.raises(ValueError, match="not finite in float16"):
        pretrained.pack(tmp_path / "large.safetensors")


def test_a_file_never_stands_in_for_a_name(named, monkeypatch):
    """Not even one of that very name in the working directory; and files that are no weights say so."""
    made, folder = named
    monkeypatch.chdir(folder)
    (folder / "test").write_bytes(save({"a": np.zeros(3)}))
    assert set(pretrained.load("test", folder / "cache")) == set(made)
    (folder / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        pretrained.load("broken.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file of weights"):
        pretrained.load("other.safetensors")
