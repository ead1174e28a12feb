"""ImageNet and Places-365: the registry."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from dpnb import experiments, results
from dpnb.experiments import imagenet
from dpnb.models import NFNet, NFResNet
from dpnb.models.weights import catalogue as pretrained
from dpnb.results import plan
from dpnb.training import make_trainer


@pytest.mark.parametrize(
    ("key", "make"),
    [
        (("nf-resnet", 50, 224), lambda: NFResNet(50, rngs=nnx.Rngs(0))),
        (("nf-resnet", 200, 224), lambda: NFResNet(200, rngs=nnx.Rngs(0))),
        (("nfnet-f3", 0, 320), lambda: NFNet("F3", rngs=nnx.Rngs(0))),
    ],
)
def test_multiply_adds_are_those_that_xla_counts(key, make):
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    image = jax.ShapeDtypeStruct((1, key[2], key[2], 3), jnp.float32)
    lowered = jax.jit(lambda p, x: nnx.merge(graph, p, rest)(x)).lower(params, image)
    assert lowered.cost_analysis()["flops"] / 2 == pytest.approx(imagenet.FORWARD[key], rel=0.002)


def test_every_known_number_has_a_cell():
    known = {(e.paper_mean, e.epsilon) for e in imagenet.TABLE if e.paper_mean is not None}
    from_jft = {(77.1, 1), (81.1, 8), (83.8, 0.5), (84.4, 1), (85.1, 2), (85.8, 4), (86.7, 8)}
    assert known == {(32.4, 8), (55.0, 8)} | from_jft
    assert {(e.paper_mean, e.epsilon) for e in imagenet.TABLE if e.impossible} == from_jft
    unverified = {e.paper_mean for e in imagenet.TABLE if "unverified" in e.paper_source}
    assert unverified == {32.4, 84.4, 85.1, 85.8, 55.0}


def test_the_papers_settings_from_scratch():
    e = experiments.get("imagenet/scratch/nf-resnet-50/eps8")
    assert (e.expected_batch_size, e.augmult, e.steps, e.delta) == (16_384, 4, 71_589, 8e-7)
    assert (e.learning_rate, e.momentum, e.clip_norm, e.ema_decay) == (4.0, 0.0, 1.0, 0.99999)
    assert (e.network, e.depth, e.width, e.image_size) == ("nf-resnet", 50, 1, 224)


def test_status_says_what_a_cell_costs_or_why_it_cannot_be():
    cell = experiments.get("imagenet/scratch/nf-resnet-50/eps8")
    hours = plan.on("H100", cell).hours
    assert 100 < hours < 1000
    assert results.status(cell, []) == f"runnable, about {hours:.0f} H100-hours (computed)"
    ours = cell.replace(noise_multiplier=1.0)
    measured = {
        "devices": "1 x NVIDIA H100, jax 0", "seconds": 90 * 3600.0, "hyper_parameters": vars(ours), "experiment": cell.name,
        "preset": "paper", "finished": "2026-11-28", "stopped": "stopped in time", "privacy": {"steps": cell.steps * 0.9},
    }  # fmt: skip
    assert results.status(cell, [measured]) == "runnable, about 100 H100-hours (measured)"
    impossible = experiments.get("imagenet/finetune/nfnet-f3-jft/eps0.5")
    assert results.status(impossible, []) == "impossible in public"
    assert "JFT-300M" in impossible.impossible and "places365" in impossible.impossible
    with pytest.raises(ValueError, match="never released"):
        pretrained.load(impossible.pretrained)


@pytest.mark.parametrize("e", imagenet.TABLE, ids=lambda e: e.name)
def test_weights_never_saw_the_private_photographs(e):
    """In particular none of ImageNet-21k on ImageNet; a file of ours says itself what it saw."""
    if e.pretrained in pretrained.WEIGHTS:
        assert not pretrained.names(e.dataset, pretrained.saw(e.pretrained))
    elif e.pretrained and not e.impossible:
        assert e.dataset.partition("_")[0] not in e.pretrained


@pytest.mark.parametrize("name", ["nfnet-f3-imagenet21k", "nfnet-f0-imagenet", "nf-resnet-50-imagenet"])
def test_weights_of_imagenet_are_refused_for_imagenet(name):
    assert pretrained.names("imagenet2012", pretrained.saw(name))
    assert not pretrained.names("places365_small", pretrained.saw(name))


def test_experiments_make_their_networks():
    """The network, width and weights that the registry says; at full size as shapes only."""
    e = experiments.get("imagenet/scratch/nf-resnet-50/eps8", "smoke", noise_multiplier=1.0)
    trainer = make_trainer(e, tiny.data(), seed=0)
    assert isinstance(trainer.state.params["stem"]["kernel"], jax.Array)
    assert trainer.state.params["stem"]["kernel"].shape == (7, 7, 3, 16)
    assert trainer.state.params["blocks"][0]["skip_gain"] == 1
