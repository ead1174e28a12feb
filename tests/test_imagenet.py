"""ImageNet and Places-365: the registry, the two notebooks, and the program for several hosts."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import nbformat
import pytest
import shared_runs
from flax import nnx
from shared_runs import execute
from test_distributed import free_port

from dpnb import experiments, results
from dpnb.experiments import imagenet
from dpnb.models import NFNet, NFResNet
from dpnb.models.weights import catalogue as pretrained
from dpnb.training.update import make_trainer


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
    assert results.status(experiments.get("imagenet/scratch/nf-resnet-50/eps8"), []).startswith(
        "runnable, about 315 H100-hours"
    )
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
    import tiny

    e = experiments.get("imagenet/scratch/nf-resnet-50/eps8", "smoke", noise_multiplier=1.0)
    trainer = make_trainer(e, tiny.data(), seed=0)
    assert isinstance(trainer.state.params["stem"]["kernel"], jax.Array)
    assert trainer.state.params["stem"]["kernel"].shape == (7, 7, 3, 16)
    assert trainer.state.params["blocks"][0]["skip_gain"] == 1


def figures(outputs):
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    return (*execute("imagenet_from_scratch.ipynb", folder), folder)


def test_training_from_scratch(scratch):
    """On digits as JPEG files: read, drawn, trained, and honest about it."""
    outputs, text, folder = scratch
    assert figures(outputs) == 4
    assert "unreadable photographs in the updates of the curve: 0" in text
    assert "paper:" not in text  # whose number is of other data
    assert "image file is truncated" in text and "photographs a second and core" in text
    assert "impossible in public" in text and "so the two are not comparable" in text
    record = json.loads((folder / "result.json").read_text())
    assert record["hyper_parameters"]["network"] == "nf-resnet" and record["privacy"]["steps"] == 3
    assert (
        record["privacy"]["epsilon_pld"] == pytest.approx(8, abs=1e-3) and "unreadable" in record["curve"][0]
    )


def test_the_program_for_several_hosts(scratch, tmp_path):
    """Two processes on this machine, as the notebook says; the record is the first one's."""
    *_, folder = scratch
    port = free_port()
    command = [sys.executable, folder / "train_on_hosts.py", f"127.0.0.1:{port}", "2"]
    processes = [
        subprocess.Popen(
            [*map(str, [*command, rank, tmp_path])], env=shared_runs.environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=800)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said[0][-2000:]
    two, one = (json.loads((place / "result.json").read_text()) for place in (tmp_path, folder))
    assert two["devices"].startswith("2 x") and one["devices"].startswith("1 x")
    assert two["privacy"] == one["privacy"] and "EMA" in said[0]
    losses = [[point["train_loss"] for point in record["curve"]] for record in (two, one)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)  # the same photographs and views


def test_fine_tuning(tmp_path):
    """All layers and the classifier alone, from weights of random textures."""
    outputs, text = execute("imagenet_finetune.ipynb", tmp_path)
    assert figures(outputs) == 2 and "JFT-300M" in text
    assert "nfnet-f3-imagenet21k on imagenet2012, classes tench: refused" in text
    assert "nf-resnet-50-imagenet on mine, classes n01440764, n02102040: refused" in text
    assert "nf-resnet-14-textures on imagenet2012, classes tench: allowed" in text
    records = [json.loads(file.read_text()) for file in tmp_path.rglob("result.json")]
    assert sorted(r["hyper_parameters"]["trainable"] for r in records) == ["all", "classifier"]
    assert all(r["pretrained"]["weights"] == "nf-resnet-14-textures" for r in records)
    assert all("no photograph" in r["pretrained"]["saw"] for r in records)


def test_the_notebooks_name_each_other():
    folder = shared_runs.NOTEBOOK.parent
    for name, other in (
        ("imagenet_from_scratch", "imagenet_finetune"),
        ("imagenet_finetune", "imagenet_from_scratch"),
    ):
        assert f"{other}.ipynb" in "".join(c.source for c in nbformat.read(folder / f"{name}.ipynb", 4).cells)
