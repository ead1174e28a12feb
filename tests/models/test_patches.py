"""Features of patches against their definition, how they are learnt, and the weights that come with dpnb."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from dpnb import data, experiments, training
from dpnb.data import Dataset, Split
from dpnb.data.augment import normalise
from dpnb.models import check_independent, patches, registry, weights
from dpnb.models.weights import patches as learning
from dpnb.models.weights.__main__ import main
from dpnb.training import features

RANDOM = np.random.default_rng(0)
WIDTH = 1 / 24  # 8 filters at each scale, 42 features


def images(n: int) -> np.ndarray:
    """Smooth random images, of which neighbouring pixels are alike as in photographs: uint8 [n, 32, 32, 3]."""
    rough = RANDOM.normal(size=(n, 36, 36, 3))
    smooth = sum(rough[:, i : i + 32, j : j + 32] for i in range(5) for j in range(5))
    return np.clip(128 + 12 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def public() -> Dataset:
    return Dataset(
        "public", Split(images(300), np.zeros(300, int)), Split(images(2), np.zeros(2, int)), ("one",), ""
    )


@pytest.fixture(scope="module")
def learnt(public) -> dict[str, np.ndarray]:
    return learning.learn(public, WIDTH)


@pytest.fixture(scope="module")
def model(learnt) -> patches.PatchLinear:
    size = learnt["whitening"].shape[1]
    made = patches.PatchLinear(10, learnt["banks/0/bias"].size, size, rngs=nnx.Rngs(0))
    weights.load_pretrained_params(made, learnt)
    return made


def by_definition(model: patches.PatchLinear, image: np.ndarray) -> np.ndarray:
    """The features of one image, patch by patch, and those of its mirror image, averaged before the root."""
    found = []
    for bank, by in zip(model.banks, patches.SCALES, strict=True):
        sides = []
        for pixels in (image, image[:, ::-1]):
            small = pixels.astype(float).reshape(32 // by, by, 32 // by, by, 3).mean((1, 3))
            n = len(small) - patches.SIZE + 1
            answers = np.empty((n, n, 2 * bank.bias.shape[0]))
            for i in range(n):
                for j in range(n):
                    patch = small[i : i + 6, j : j + 6]
                    patch = (patch - patch.mean()) / np.sqrt(patch.var() + patches.CONTRAST)
                    kernel = np.asarray(bank.kernel[...], float)
                    both = np.concatenate([kernel, kernel[:, ::-1]], -1)
                    answers[i, j] = np.einsum("ijc,ijck->k", patch, both) + np.tile(bank.bias[...], 2)
            half = (n + 1) // 2
            for sign in (1, -1):
                kept = np.maximum(sign * answers - patches.THRESHOLD, 0)
                sides.append([kept[:half, :half].mean((0, 1)), kept[-half:, :half].mean((0, 1))])
        positive, negative, mirrored_positive, mirrored_negative = map(np.array, sides)
        found += [
            np.sqrt((positive + mirrored_positive) / 2),
            np.sqrt((negative + mirrored_negative) / 2),
        ]
    white = (np.concatenate([f.ravel() for f in found]) - model.mean[...]) @ np.asarray(
        model.whitening[...], float
    )
    return white / np.sqrt((white**2).mean())


def test_features_are_what_the_definition_says(model):
    image = images(1)
    got = model.features(normalise(image))
    np.testing.assert_allclose(got[0], by_definition(model, image[0]), atol=2e-3)
    np.testing.assert_allclose(np.square(got).mean(1), 1, rtol=1e-4)


def test_a_mirrored_image_has_the_same_features(model):
    given = images(4)
    np.testing.assert_allclose(
        model.features(normalise(given)), model.features(normalise(given[:, :, ::-1])), atol=2e-3
    )


def test_brightness_does_not_count_and_contrast_hardly(model):
    given = images(3).clip(60, 180)
    brighter = model.answers(jnp.float32(given) + 40)
    np.testing.assert_allclose(brighter, model.answers(jnp.float32(given)), atol=2e-3)
    contrast = model.answers(1.2 * (jnp.float32(given) - 120) + 120)
    np.testing.assert_allclose(contrast, model.answers(jnp.float32(given)), atol=0.05)


def test_examples_stay_apart_and_flat_images_stay_finite(model):
    check_independent(model, RANDOM.normal(size=(3, 32, 32, 3)))
    assert np.isfinite(model.features(normalise(np.full((1, 32, 32, 3), 7, np.uint8)))).all()


def test_k_means_finds_the_directions_of_points_of_either_sign():
    true = np.linalg.qr(RANDOM.normal(size=(20, 3)))[0].T
    points = true[RANDOM.integers(3, size=3000)] * RANDOM.choice([-1, 1], size=(3000, 1))
    points = points + 0.05 * RANDOM.normal(size=points.shape)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = learning.k_means(points.astype(np.float32), 12, RANDOM)
    assert np.abs(true @ found.T).max(1).min() > 0.97
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_whitened_answers_are_uncorrelated_and_rare_directions_smaller():
    answers = (RANDOM.normal(size=(4000, 6)) * [9, 5, 3, 2, 1, 0.1]) @ np.linalg.qr(
        RANDOM.normal(size=(6, 6))
    )[0]
    mean, whitening = learning.whiten(answers.astype(np.float32), 4)
    covariance = np.cov(((answers - mean) @ whitening).T)
    values = np.linalg.eigvalsh(np.cov(answers.T))[::-1]
    want = values[:4] / (values[:4] + learning.FLOOR * values.mean())
    np.testing.assert_allclose(covariance, np.diag(want), atol=1e-3)


def test_filters_do_not_see_the_mean_of_a_patch(learnt):
    for scale in range(len(patches.SCALES)):
        assert np.abs(learnt[f"banks/{scale}/kernel"].sum((0, 1, 2))).max() < 1e-4


def test_labels_are_not_read_and_the_seed_decides(public, learnt):
    other = dataclasses.replace(
        public, train=Split(public.train.images, np.arange(300) % 2), classes=("a", "b")
    )
    again = learning.learn(other, WIDTH)
    assert again.keys() == learnt.keys()
    for name, array in learnt.items():
        np.testing.assert_array_equal(again[name], array)
    assert (
        np.abs(learning.learn(public, WIDTH, seed=1)["banks/0/kernel"] - learnt["banks/0/kernel"]).max() > 0.1
    )


def test_too_few_images_are_refused(public):
    with pytest.raises(ValueError, match="covariance of 1024 features needs twice as many images, got 300"):
        learning.learn(public)


def test_the_command_writes_what_was_seen(public, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "load", lambda name, data_dir: public)
    monkeypatch.setattr(patches, "FILTERS", 8)
    monkeypatch.setattr(patches, "FEATURES", 40)
    file = tmp_path / "patches.safetensors"
    assert main(["learn", "public", str(file)]) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert weights.saw(file) == f"public (fingerprint {public.fingerprint})"
    assert weights.load(str(file))["whitening"].dtype == np.float16
    with pytest.raises(ValueError, match="must not have seen the private data"):
        weights.provenance(str(file), public)


@pytest.mark.parametrize("name", ["patches-dead-leaves", "patches-tiny-imagenet32"])
def test_weights_that_come_with_dpnb(name):
    """They fit the network, and no feature of random images is constant."""
    e = experiments.get("cifar10/patch-linear/eps1").replace(pretrained=name)
    model = registry.make_network(e, 10, nnx.Rngs(0))
    found = nnx.jit(lambda model, given: model.features(normalise(given)))(model, images(20))
    assert found.shape == (20, patches.FEATURES) and np.isfinite(found).all() and found.std(0).min() > 1e-2


def test_photographs_of_imagenet_are_refused_as_private_data():
    private = tiny.data()
    for name in ("imagenet2012", "tiny_imagenet32"):
        with pytest.raises(ValueError, match="must not have seen"):
            weights.provenance("patches-tiny-imagenet32", dataclasses.replace(private, name=name))


def test_a_private_layer_learns_on_them(tmp_path):
    """Ten classes of digits, from 1,500 images: far above chance at epsilon 8."""
    digits = data.load("digits")
    e = experiments.get(
        "cifar10/patch-linear/eps8",
        dataset="digits",
        steps=20,
        expected_batch_size=1500,
        delta=1e-4,
        eval_every=0,
    )
    read = features.prepare(e, digits)
    assert read.train.images.shape == (1500, patches.FEATURES)
    run = training.train(e, read, tmp_path, devices=jax.devices()[:1])
    assert run.ema.accuracy > 60
