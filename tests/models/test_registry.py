"""The table of networks: one line makes a network trainable, a source of features, and a row of a table."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from dpnb import results
from dpnb.experiments import Experiment
from dpnb.models import NETWORKS, Network, registry
from dpnb.results import flatten
from dpnb.training import train


class Patches(nnx.Module):
    """Four patches of 4x4 pixels, a ReLU, their mean, a linear layer: depth is of no matter, width is.

    It looks at those pixels alone that an array of its own chooses, which must be known while a program is traced.
    """

    def __init__(self, width: int, num_classes: int, rngs: nnx.Rngs):
        self.chosen = np.ones(48, bool)
        self.stem = nnx.Linear(48, 8 * width, rngs=rngs)
        self.linear = nnx.Linear(8 * width, num_classes, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        n, h, w, c = images.shape
        patches = images.reshape(n, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, 48)
        return nnx.relu(self.stem(patches[..., self.chosen])).mean(1)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.linear(self.features(images))


@pytest.fixture
def patches(monkeypatch):
    """The line that a contributor writes."""

    def build(experiment, num_classes, rngs):
        return Patches(experiment.width, num_classes, rngs)

    line = Network(build, "Patches-{width}", 8, "mean of patches", ("width",), feature_batch=16)
    monkeypatch.setitem(NETWORKS, "patches", line)


@pytest.mark.slow
def test_one_line_is_enough_for_training_features_and_a_record(patches, tmp_path):
    """From random parameters; then, from the weights that this leaves, all layers and the last one alone."""
    data, e = tiny.data(), tiny.experiment(network="patches", width=2, sampler="poisson")
    first = train(e, data, tmp_path / "first", devices=jax.devices()[:1])
    results.save(first, data, tmp_path / "first")
    (record,) = results.load(tmp_path / "first")
    assert record["hyper_parameters"]["network"] == "patches" and first.steps == 6
    assert flatten(first.params)["stem/kernel"].shape == (48, 16)
    assert "Patches-2" in list(results.summary([first.experiment], [record])["network"])

    from dpnb.training import features

    other = dataclasses.replace(
        tiny.data(seed=1), name="other"
    )  # weights that saw these very images are refused
    path = tmp_path / "first" / "ema.safetensors"
    last = e.replace(pretrained=path, trainable="classifier", augmult=0, dataset="other")
    read = features.prepare(last, other)
    assert read.train.images.shape == (64, 16) and features.prepare(last, other) is read
    trained = train(last, read, tmp_path / "last", devices=jax.devices()[:1])
    assert flatten(trained.params)["kernel"].shape == (tiny.CLASSES, 16)
    model = registry.make_network(last, tiny.CLASSES, nnx.Rngs(5))
    np.testing.assert_array_equal(model.stem.kernel[...], flatten(first.ema_params)["stem/kernel"])


def test_a_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match=r"network must be one of \('wrn', .*, got 'patches'"):
        Experiment("x", network="patches")
    with pytest.raises(ValueError, match="network must be one of"):
        registry.find_network("patches")


def test_labels():
    def label(**changes):
        return registry.label(Experiment("x", **changes))

    assert (
        label(depth=40, width=4) == "WRN-40-4"
        and label(network="scatter-linear", augmult=0) == "scatter-linear"
    )
    assert label(network="nf-resnet", depth=50, width=1) == "NF-ResNet-50"
    assert label(network="nf-resnet-timm", depth=50, width=1) == "NF-ResNet-timm-50"
    assert label(network="nfnet-f3", depth=0, width=1) == "NFNet-F3"
    assert (
        label(network="nf-resnet", depth=14, width=0.25, image_size=64) == "NF-ResNet-14 (width 0.25, 64 px)"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_feature_sizes_are_those_of_the_networks(name):
    e = Experiment("x", network=name, depth=14 if "resnet" in name else 10, width=1, augmult=0)
    model = nnx.eval_shape(lambda: registry.make_network(e, 10, nnx.Rngs(0)))
    if not NETWORKS[name].fixed:
        assert model.linear.kernel.shape[0] == registry.feature_size(e)
