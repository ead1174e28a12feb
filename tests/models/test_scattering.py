"""The scattering transform against its definition, against another library, and as private features."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_runs
import tiny

from dpnb import data, training
from dpnb.experiments import Experiment
from dpnb.gradients import clipped_grad
from dpnb.models import ScatterLinear, functional, scattering
from dpnb.training import features

RANDOM = np.random.default_rng(0)
FEATURES = jax.jit(scattering.features)


def test_filters_are_what_they_should_be():
    """Low pass of sum 1; wavelets of sum 0, with their peak at the frequency and angle that they name."""
    low, scales = scattering.filters(40)
    assert low[0, 0] == pytest.approx(1, abs=1e-6)
    for j, bank in enumerate(scales):
        assert np.abs(bank[:, 0, 0]).max() < 1e-12
        for k, wavelet in enumerate(bank):
            x, y = (2 * math.pi * np.fft.fftfreq(40)[i] for i in np.unravel_index(wavelet.argmax(), (40, 40)))
            assert math.hypot(x, y) == pytest.approx(0.75 * math.pi / 2**j, abs=0.2)
            turn = (3 - k) * math.pi / 8
            assert abs(math.remainder(math.atan2(y, x) - turn, 2 * math.pi)) < 0.15


@pytest.mark.parametrize("inverse", [False, True])
def test_dft_of_real_and_complex_images(inverse):
    images = RANDOM.random((2, 3, 20, 20)).astype(np.float32)
    for given in (images, images + 1j * images[::-1]):
        want = np.fft.ifft2(given) if inverse else np.fft.fft2(given)
        np.testing.assert_allclose(scattering.dft2(given, inverse), want, atol=1e-5 * np.abs(want).max())


def test_a_batch_ends_where_there_is_one_device():
    """XLA's own FFT waited for itself forever, from 50 images on; the subprocess has a single device."""
    code = "from dpnb.models import scattering; print(scattering.standards(32)[0].shape)"
    done = shared_runs.python("-c", code, timeout=300, **shared_runs.DEFAULTS)
    assert done.stdout == "(81,)\n", done.stderr


def test_flat_image():
    """Its mean, and nothing else: every wavelet has sum zero."""
    s = np.asarray(scattering.scattering(np.full((1, 32, 32), 0.5, np.float32)))
    assert s.shape == (1, 8, 8, scattering.CHANNELS)
    np.testing.assert_allclose(s[..., 0], 0.5, atol=1e-4)
    assert np.abs(s[..., 1:]).max() < 1e-4


def test_direct_convolution():
    """First-order coefficients as sums over pixels, without Fourier transforms or folding."""
    image = RANDOM.random((32, 32))
    padded = np.pad(image, 4, mode="reflect")
    low, (fine, _) = scattering.filters(40)

    def convolve(x, spectrum):  # circular, as a sum of shifted copies
        kernel = np.fft.ifft2(spectrum)
        return sum(
            kernel[a, b] * np.roll(x, (a, b), (0, 1))
            for a in range(40)
            for b in range(40)
            if abs(kernel[a, b]) > 1e-9
        )

    got = np.asarray(scattering.scattering(image[None].astype(np.float32)))[0]
    for k in (0, 3, 5):
        smooth = convolve(np.abs(convolve(padded, fine[k])), low).real[4:-4:4, 4:-4:4]
        np.testing.assert_allclose(got[..., 1 + k], smooth, atol=2e-5)
    np.testing.assert_allclose(got[..., 0], convolve(padded, low).real[4:-4:4, 4:-4:4], atol=5e-5)


@pytest.mark.skipif(importlib.util.find_spec("kymatio") is None, reason="kymatio is not installed")
def test_agrees_with_kymatio():
    from kymatio.scattering2d.frontend.numpy_frontend import ScatteringNumPy2D

    images = RANDOM.random((3, 32, 32)).astype(np.float32)
    want = np.moveaxis(ScatteringNumPy2D(J=2, shape=(32, 32))(images), 1, -1)
    np.testing.assert_allclose(scattering.scattering(images), want, atol=5e-5)


def test_wrong_shape():
    for shape in ((1, 32, 30), (32, 32), (1, 30, 30)):
        with pytest.raises(ValueError, match="multiple of 4"):
            scattering.scattering(np.zeros(shape, np.float32))


def test_random_images_look_like_photographs():
    """As far as a spectrum goes: amplitude falls as 1 / frequency; the same on every call."""
    images = scattering.random_images(50)
    assert images.shape == (50, 32, 32, 3) and images.dtype == np.uint8
    assert (images == scattering.random_images(50)).all()
    power = np.square(np.abs(np.fft.fft2(images / 255.0, axes=(1, 2)))).mean((0, 3))
    assert power[0, 2] / power[0, 8] == pytest.approx(16, rel=0.3)
    assert np.corrcoef(images[..., 0].ravel(), images[..., 1].ravel())[0, 1] == pytest.approx(0.9, abs=0.03)


@pytest.mark.slow
def test_features_are_standardised():
    """Random images: about mean 0 and deviation 1 by channel; every image: mean 0 and variance 1."""
    mean, std = scattering.standards()
    assert mean.shape == std.shape == (scattering.CHANNELS,) and (std > 0.01).all()
    made = np.asarray(FEATURES(scattering.random_images(60), mean, std))
    assert made.shape == (60, 8, 8, 243)
    np.testing.assert_allclose(made.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(made.var((1, 2, 3)), 1, rtol=1e-4)
    channels = made.reshape(-1, 3, scattering.CHANNELS)
    assert np.abs(channels.mean((0, 1))).max() < 0.3
    assert channels.std((0, 1)).min() > 0.6 and channels.std((0, 1)).max() < 1.5
    black = FEATURES(np.zeros((60, 32, 32, 3), np.uint8), mean, std)
    assert np.isfinite(black).all()


@pytest.mark.slow
def test_features_look_at_one_image_only():
    standards = scattering.standards()
    images = RANDOM.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    changed = images.copy()
    changed[2] = 255 - changed[2]
    a, b = (np.asarray(FEATURES(x, *standards)) for x in (images, changed))
    moved = np.abs(a - b).max((1, 2, 3)) > 1e-6
    assert moved.tolist() == [False, False, True, False]


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_layer_per_example(rows, float64):
    """Its own gradient equals that of an ordinary product, alone and under the clipped gradient."""
    model = ScatterLinear(5, (7,))
    params, apply = functional(model)
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape, jnp.float64), params)
    x = jax.random.normal(jax.random.key(2), (6, rows, 7), jnp.float64)

    def plain(params, x):
        return jnp.square(x @ params["kernel"].T + params["bias"]).sum(-1)

    def ours(params, x):
        return jnp.square(apply(params, x)).sum(-1)

    got, _ = clipped_grad(ours, 1.0)(params, x)
    want, _ = clipped_grad(plain, 1.0)(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Features of 100 images at a time, not of 500: batches are filled up, and there are few images here."""
    original = features._features
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_features", lambda *given: original(*given, 100))
        shared_runs.optimise_scattering(patch)
        yield


@pytest.fixture(scope="module")
def digits():
    loaded = data.load("digits")
    return data.Dataset(
        "digits", data.Split(loaded.train.images[:300], loaded.train.labels[:300]),
        data.Split(loaded.test.images[:100], loaded.test.labels[:100]), loaded.classes,
    )  # fmt: skip


EXPERIMENT = Experiment(
    "x", dataset="digits", network="scatter-linear", epsilon=8.0, delta=1e-3, steps=25, expected_batch_size=60,
    augmult=0, clip_norm=10.0, learning_rate=0.2, momentum=0.9, eval_every=0, physical_batch_size=8, accountant="rdp",
    ema_decay=0.5,
)  # fmt: skip


@pytest.mark.slow
def test_a_private_linear_layer_learns(digits, tmp_path):
    """The same loop, ledger and refusal as for images; false-alarm rate: none, seeds are fixed."""
    ready = features.prepare(EXPERIMENT, digits)
    assert ready.train.images.shape == (300, 8, 8, 243) and ready.train.images.dtype == np.float32
    run = training.train(EXPERIMENT, ready, tmp_path, devices=jax.devices()[:1])
    assert run.steps == 25 and run.events[0]["steps"] == 25
    assert run.ema.accuracy > 60


def test_identity_of_features(digits):
    """That of the images and the transform, known without computing it; prepared once."""
    ready = features.prepare(EXPERIMENT, digits)
    assert features.prepare(EXPERIMENT, digits) is ready and features.prepare(EXPERIMENT, ready) is ready
    assert ready.fingerprint == features.fingerprint(EXPERIMENT, digits) != digits.fingerprint
    images = Experiment("x")
    assert features.prepare(images, digits) is digits
    assert features.prepare_test(images, digits) is digits.test
    assert features.fingerprint(images, digits) == digits.fingerprint
    other = features.fingerprint(EXPERIMENT, tiny.data())
    assert other != ready.fingerprint


def test_features_of_test_images_alone_are_the_same_to_the_bit(digits, monkeypatch):
    """Which is all that verification reads: no training image is looked at."""
    ready = features.prepare(EXPERIMENT, digits)
    assert features.prepare_test(EXPERIMENT, ready) is ready.test
    read, extract = [], features.extract
    monkeypatch.setattr(features, "extract", lambda *given: read.append(given[1]) or extract(*given))
    alone = features.prepare_test(EXPERIMENT, digits)
    assert len(read) == 1 and read[0] is digits.test
    assert alone.images.tobytes() == ready.test.images.tobytes()
    assert alone.labels.tolist() == ready.test.labels.tolist()


def test_no_views_of_features():
    with pytest.raises(ValueError, match="augmult 0"):
        EXPERIMENT.replace(augmult=2)
