"""Public weights into a network: what begins where, what moves, what is refused, and what is on record."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from dpnb import data, results, sweep, training
from dpnb.data import augment
from dpnb.models import WideResNet, check_independent, functional
from dpnb.models.registry import make_model
from dpnb.models.weights import catalogue as pretrained
from dpnb.models.weights import transfer
from dpnb.results import flatten, verification
from dpnb.training import features


def network(seed, classes=tiny.CLASSES, depth=10):
    return WideResNet(depth, 1, classes, rngs=nnx.Rngs(seed))


def train(e, images, folder, **options):
    """On one device, as their number does not matter here; as an experiment on these images, whatever their name."""
    return training.train(e.on(images.name), images, folder, devices=jax.devices()[:1], **options)


def leaves(model):
    return flatten(functional(model)[0])


@pytest.fixture
def public(tmp_path):
    """A file of a WRN-10-1 with seven other classes."""
    path = tmp_path / "public.safetensors"
    save_file(leaves(network(5, 7)), path)
    return str(path)


def experiment(public, trainable="all", **changes):
    fields = dict(network="wrn", depth=10, width=1, steps=2, augmult=0, eval_every=0, physical_batch_size=2)
    return tiny.experiment(**{**fields, **changes}, pretrained=public, trainable=trainable)


@pytest.mark.slow
def test_everything_but_the_classifier_is_public(public):
    model, theirs = network(1), load_file(public)
    own = leaves(model)
    transfer.load_pretrained_params(model, theirs)
    for name, array in leaves(model).items():
        expected = own[name] if name.startswith("linear/") else theirs[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    both = nnx.jit(lambda ours, theirs, images: (ours.features(images), theirs.features(images)))
    np.testing.assert_array_equal(*both(model, network(5, 7), images))


@pytest.mark.parametrize("other", ["depth", "width", "nothing", "more"])
def test_another_network_is_refused_and_nothing_is_set(other):
    model = network(1)
    given = {
        "depth": lambda: leaves(network(0, depth=16)),
        "width": lambda: leaves(WideResNet(10, 2, 4, rngs=nnx.Rngs(0))),
        "nothing": dict,
        "more": lambda: leaves(network(0)) | {"blocks/0/mean": np.zeros(3, np.float32)},
    }[other]()
    before = leaves(model)
    with pytest.raises(ValueError, match="the public weights must be this network's"):
        transfer.load_pretrained_params(model, given)
    assert all((array == before[name]).all() for name, array in leaves(model).items())


@pytest.mark.slow
def test_last_k_trains_the_last_blocks_and_what_follows():
    model = network(0)  # three blocks
    whole = leaves(model)
    transfer.freeze(model, "last-2")
    trained = set(leaves(model))
    expected = {n for n in whole if n.startswith(("blocks/1/", "blocks/2/", "norm/", "linear/"))}
    assert trained == expected and len(trained) < len(whole)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params, apply = functional(model)
    all_params, whole_apply = functional(network(0))

    @jax.jit
    def both(params, all_params):
        """Outputs, and the gradient of their squares."""

        def squares(apply):
            return lambda p: (jnp.square(y := apply(p, images)).sum(), y)

        return jax.grad(squares(apply), has_aux=True)(params), jax.grad(squares(whole_apply), has_aux=True)(
            all_params
        )

    (got, outputs), (want, whole_outputs) = both(params, all_params)
    # Not to the bit: frozen parameters are constants of the program, so it is compiled otherwise.
    np.testing.assert_allclose(outputs, whole_outputs, rtol=1e-4, atol=1e-5)
    want = flatten(want)
    for name, gradient in flatten(got).items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_more_blocks_than_there_are():
    with pytest.raises(ValueError, match="has 3 blocks; use last-3"):
        transfer.freeze(network(0), "last-4")


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "moved"), [("last-1", ("blocks/2/", "norm/", "linear/")), ("all", "")])
def test_training_moves_what_is_trained(public, trainable, moved, tmp_path):
    e = experiment(public, trainable)
    run = train(e, tiny.data(), tmp_path)
    after, before = flatten(run.params), load_file(public)
    assert set(after) == {name for name in before if name.startswith(moved)}
    for name, array in after.items():
        # A weight's own mean never gets a gradient under standardisation; every leaf as a whole does.
        assert name.startswith("linear/") or not np.array_equal(array, before[name]), name


@pytest.mark.slow
def test_classifier_only_is_the_last_layer_of_the_same_network(public):
    """Logits of the linear layer on extracted features are those of the network with that classifier."""
    e, images = experiment(public, "classifier"), tiny.data(20)
    prepared = features.prepare(e, images)
    assert prepared.train.images.shape == (20, 64) and prepared.train.images.dtype == np.float32
    assert features.fingerprint(e, images) == prepared.fingerprint
    assert features.prepare_test(e, images).images.tobytes() == prepared.test.images.tobytes()
    params, apply = functional(make_model(e, tiny.CLASSES, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    whole = make_model(e.replace(trainable="all"), tiny.CLASSES, nnx.Rngs(0))
    whole.linear.kernel, whole.linear.bias = nnx.Param(params["kernel"].T), nnx.Param(params["bias"])
    want = nnx.jit(lambda model, x: model(x))(whole, augment.normalise(images.train.images))
    np.testing.assert_allclose(apply(params, prepared.train.images), want, rtol=1e-4, atol=1e-4)


class TwoLayers(nnx.Module):
    """59,104 weights."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.Sequential(nnx.Linear(192, 300, rngs=rngs), nnx.relu, nnx.Linear(300, 4, rngs=rngs))

    def __call__(self, images):
        return self.layers(images.reshape(len(images), -1))


@pytest.mark.filterwarnings("error:A large amount of constants")
def test_weights_are_arguments_of_programs(public, tmp_path):
    """Constants within them would be compiled with them, again for each seed and each file."""
    large, images = 200_000, tiny.data(20)
    before = jax.config.jax_captured_constants_warn_bytes
    try:
        jax.config.update("jax_captured_constants_warn_bytes", large)
        weights = jnp.ones(large)
        with pytest.raises(UserWarning, match="constants were captured"):
            jax.jit(lambda x: weights + x)(1.0)
        features.prepare(experiment(public, "classifier"), images)  # of a network with 315 kB
        train(tiny.experiment(augmult=0), tiny.data(), tmp_path, model=TwoLayers())
        check_independent(
            make_model(experiment(public, "last-1"), tiny.CLASSES, nnx.Rngs(0)), images.train.images / 255
        )
        params, apply = functional(TwoLayers())
        verification.measure(apply, params, images.test, images.recipe, 1e-3)
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", before)


def test_features_of_other_weights_are_other_data(public, tmp_path):
    """So that neither seed, checkpoint nor record of one serves the other."""
    other = str(tmp_path / "other.safetensors")
    save_file(leaves(network(6, 7)), other)
    images = tiny.data(20)
    one, two = (features.fingerprint(experiment(p, "classifier"), images) for p in (public, other))
    assert one != two != images.fingerprint


@pytest.mark.slow
def test_full_batches_of_features_train_with_every_example(public, tmp_path):
    e = experiment(public, "classifier", expected_batch_size=64, steps=3, physical_batch_size=None)
    prepared = features.prepare(e, tiny.data())
    run = train(e, prepared, tmp_path)
    record = results.save(run, prepared, tmp_path)
    assert record["privacy"]["sampling_probability"] == 1 and record["curve"][-1]["batch_size"] == 64
    assert 0 < record["privacy"]["epsilon_pld"] <= record["privacy"]["epsilon_rdp"]


def train_public(folder, images, **changes):
    """Weights trained without privacy on these images, as a path."""
    e = tiny.experiment(**{**SCRATCH, "epsilon": float("inf"), "noise_multiplier": 0.0, **changes})
    results.save(train(e, images, folder), images, folder)
    return str(folder / "ema.safetensors")


def named(name, **given):
    return dataclasses.replace(tiny.data(**given), name=name)


@pytest.mark.slow
def test_weights_that_saw_the_private_images_are_refused(tmp_path):
    """Before anything is spent: also held-out parts of them, and by way of another public set in between."""
    private = named("flowers")
    path = train_public(tmp_path / "public", private)
    says = "must not have seen the private data .flowers.*trained on flowers, as tiny"
    with pytest.raises(ValueError, match=says):
        train(experiment(path), private, tmp_path / "private")
    with pytest.raises(ValueError, match="must not have seen"):
        features.prepare(experiment(path, "classifier"), private)
    with pytest.raises(ValueError, match="must not have seen"):  # the same images under another name
        train(experiment(path), dataclasses.replace(private, name="birds"), tmp_path / "private")
    part = data.Split(private.train.images[:40], private.train.labels[:40])
    with pytest.raises(ValueError, match="must not have seen"):
        train(experiment(path), dataclasses.replace(private, train=part), tmp_path / "private")
    washed = train_public(tmp_path / "washed", named("trees", seed=1), pretrained=path)
    assert "before that flowers" in pretrained.saw(washed)
    with pytest.raises(ValueError, match="must not have seen"):
        train(experiment(washed), private, tmp_path / "private")
    assert not (tmp_path / "private" / "ledger.jsonl").exists()
    assert pretrained.provenance(experiment(path).pretrained, named("birds", seed=1))[
        "saw"
    ] == pretrained.saw(path)


def test_imagenet_is_known_by_its_classes_and_before_its_weights_are_fetched():
    """Photographs of ImageNet in a folder of any name; nobody downloads and converts a file first."""
    wordnet = dataclasses.replace(
        tiny.data(), name="mine", classes=("n01440764", "n02102040", "n03000684", "dog")
    )
    e = experiment("nf-resnet-50-imagenet")
    with pytest.raises(ValueError, match="must not have seen the private data .mine, also known as imagenet"):
        pretrained.provenance(e.pretrained, wordnet)
    with pytest.raises(ValueError, match="no SHA-256 is on record"):  # other classes: on to the file
        pretrained.provenance(
            e.pretrained, dataclasses.replace(wordnet, classes=("n01440764", "dog", "cat", "tree"))
        )
    assert pretrained.provenance("wrn-10-2-textures", wordnet)["saw"].startswith("random textures")


def test_weights_that_are_still_to_be_trained_say_how():
    with pytest.raises(FileNotFoundError, match="`dpnb run pretrain/places365` makes it"):
        pretrained.load("runs/pretrain/places365/paper-seed0/ema.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "there"),
    [("cifar10", "CIFAR-10", True), ("cifar10", "CIFAR-100", False), ("cifar100", "cifar_100 (all of it)", True),
     ("tiny_imagenet32", "Tiny ImageNet 32, as pretrain/tiny", True), ("imagenet", "ImageNet at 32x32", True),
     ("imagenet_resized/32x32", "Tiny ImageNet", True), ("imagenette/320px-v2", "ImageNet-21k", True),
     ("ILSVRC2012", "imagenet2012", True), ("cifar100:3.0.2", "CIFAR-100", True), ("places365_small", "ImageNet", False),
     ("places365_small:2.1.0", "places365_small, as pretrain/places365", True)],
)  # fmt: skip
def test_data_sets_are_known_by_name_however_spelt(name, text, there):
    assert pretrained.names(name, text) == there


SCRATCH = dict(network="wrn", depth=10, width=1, steps=1, augmult=0, eval_every=0, physical_batch_size=2)


@pytest.mark.slow
def test_records_say_what_the_run_began_with(public, tmp_path):
    images, e = tiny.data(), experiment(public, steps=1)
    run, content = train(e, images, tmp_path), pathlib.Path(public).read_bytes()
    pathlib.Path(public).unlink()  # whatever becomes of the file while the run trains
    record = results.save(run, images, tmp_path)
    pathlib.Path(public).write_bytes(content)
    public_ = record["pretrained"]
    assert public_["weights"] == "public.safetensors" and len(public_["sha256"]) == 64
    assert public_["sha256"] == pretrained.identity(load_file(public))
    assert "pre-trained on data that its file does not name" in results.statement(record)
    assert json.loads((tmp_path / "result.json").read_text())["pretrained"] == public_
    assert sweep.finished(record_experiment(e, record), images, [record]) == record
    save_file(leaves(network(6, 7)), public)  # another file under the same name
    assert sweep.finished(record_experiment(e, record), images, [record]) is None


def record_experiment(e, record):
    return e.replace(epsilon=record["hyper_parameters"]["epsilon"])


def test_unknown_weights_spend_nothing(tmp_path):
    with pytest.raises(KeyError, match="weights are a safetensors file or one of"):
        train(experiment("no-such-weights"), tiny.data(), tmp_path)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_public_sets_of_other_sizes_load(tmp_path):
    """Any prepared array file, of any number of classes and any image size."""
    images = np.zeros((3, 8, 8, 3), np.uint8)
    split = data.Split(images, np.array([0, 1, 199]))
    data.save(data.Dataset("public", split, split, tuple(map(str, range(200)))), tmp_path / "p.npz")
    assert len(data.load("tiny_imagenet32", file=tmp_path / "p.npz").classes) == 200


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["last-1", "classifier"])
def test_verification_sees_other_weights(public, trainable, tmp_path):
    images = tiny.data()
    data.save(images, tmp_path / "images.npz")
    e = experiment(public, trainable, steps=1)
    prepared = features.prepare(e, images)
    results.save(train(e, prepared, tmp_path), prepared, tmp_path)
    report = verification.verify(tmp_path, data_file=tmp_path / "images.npz")
    assert report.ok and report.complete, report.lines
    save_file(leaves(network(6, 7)), public)
    report = verification.verify(tmp_path, data_file=tmp_path / "images.npz")
    assert not report.ok and any("FAIL began with the weights" in line for line in report.lines)
    pathlib.Path(public).unlink()
    report = verification.verify(tmp_path, data_file=tmp_path / "images.npz")
    assert report.ok and not report.complete and "no file of weights" in report.lines[-2]


@pytest.mark.slow
def test_one_missing_file_fails_its_own_cell_only(public, tmp_path):
    lines, images = [], tiny.data()
    e = experiment(public, "classifier", steps=1)  # quick to compile
    cells = [e.replace(pretrained="nowhere/w.safetensors", name="a"), e.replace(name="b")]
    swept = sweep.run(cells, images, tmp_path, say=lines.append)
    assert [r["experiment"] for r in swept.records] == ["b"]
    assert list(swept.failures) == ["a, seed 0"] and "no file of weights" in swept.failures["a, seed 0"]


def test_a_model_of_ones_own_is_not_called_pretrained(public, tmp_path):
    with pytest.raises(ValueError, match="begins and trains as it is"):
        train(experiment(public), tiny.data(), tmp_path, model=network(0))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_features_of_one_network_do_not_pass_for_those_of_another(public, tmp_path):
    other = str(tmp_path / "other.safetensors")
    save_file(leaves(network(6, 7)), other)
    e, images = experiment(public, "classifier"), tiny.data()
    prepared = features.prepare(e, images)
    assert features.prepare(e, prepared) is prepared
    for wrong, given in (
        (experiment(other, "classifier"), prepared),
        (experiment(public), prepared),
        (e, images),
    ):
        with pytest.raises(ValueError, match="reads other features|trains on features, got images"):
            train(wrong, given, tmp_path / "run")
    with pytest.raises(ValueError, match="must say what they are made of"):
        features.FeatureDataset("x", prepared.train, prepared.test, prepared.classes)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_paths_may_be_paths_and_weights_must_be_finite(public, tmp_path):
    e = experiment(pathlib.Path(public))
    assert e.pretrained == public and e.fingerprint() == experiment(public).fingerprint()
    bad = load_file(public)
    bad["stem/bias"] = np.full_like(bad["stem/bias"], np.nan)
    with pytest.raises(ValueError, match="must be finite"):
        transfer.load_pretrained_params(network(0), bad)
