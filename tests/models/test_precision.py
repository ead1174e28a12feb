"""The dtype of a network, by device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_networks import filled, small_wide_resnet

from dpnb import experiments
from dpnb.gradients import clipped_grad
from dpnb.models import functional
from dpnb.models.precision import dtype_of, resolve


def device(platform, kind, **more):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


@pytest.mark.parametrize("found, dtype", [
    (device("cpu", "cpu"), "float32"),
    (device("tpu", "TPU v5 lite"), "bfloat16"),
    (device("gpu", "NVIDIA H100 80GB HBM3", compute_capability="9.0"), "bfloat16"),
    (device("gpu", "NVIDIA A100-SXM4-40GB", compute_capability="8.0"), "bfloat16"),
    (device("gpu", "NVIDIA RTX PRO 6000", compute_capability="12.0"), "bfloat16"),
    (device("gpu", "Tesla T4", compute_capability="7.5"), "float16"),
    (device("gpu", "Tesla V100-SXM2-16GB", compute_capability="7.0"), "float16"),
    (device("gpu", "Tesla T4"), "float16"),  # described, not there
    (device("gpu", "NVIDIA H100 80GB HBM3"), "bfloat16"),
    (device("gpu", "AMD Instinct MI250X", compute_capability="gfx90a"), "bfloat16"),
])  # fmt: skip
def test_half_precision_where_the_device_has_it(found, dtype):
    assert resolve("auto", found) == dtype
    assert {resolve(name, found) for name in ("float32", "float16")} == {"float32", "float16"}


def test_presets_for_accelerators_choose_by_device():
    for preset in ("colab", "paper"):
        assert experiments.get("cifar10/wrn-16-4/eps8", preset).compute_dtype == "auto"
        assert experiments.get("imagenet/scratch/nf-resnet-50/eps8", preset).compute_dtype == "auto"
        assert (
            experiments.get("cifar10/wrn-16-4/eps8", preset, compute_dtype="float32").compute_dtype
            == "float32"
        )
        assert experiments.get("cifar10/scatter-linear/eps3", preset).compute_dtype == "float32"
    assert experiments.get("cifar10/wrn-16-4/eps8", "teach").compute_dtype == "float32"
    assert dtype_of(experiments.get("cifar10/wrn-16-4/eps8")) is None  # on a CPU


@pytest.mark.parametrize("dtype, allowed", [("bfloat16", 0.05), ("float16", 0.01)])
def test_clipped_gradients_of_a_network_in_half_precision(dtype, allowed):
    """float16 has three more digits, if its losses are scaled."""
    exact = filled(small_wide_resnet)
    params, apply = functional(exact)
    views = np.random.default_rng(0).standard_normal((3, 2, 16, 16, 3)).astype(np.float32)
    _, half = functional(filled(lambda rngs: _in(small_wide_resnet(rngs), dtype)))

    def total(apply, **options):
        loss = lambda p, x: optax.softmax_cross_entropy_with_integer_labels(apply(p, x), jnp.zeros(2, int))
        return jax.jit(clipped_grad(loss, 1.0, **options))(params, views)[0]

    want, got = total(apply), total(half, loss_scaling=dtype == "float16")
    got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (got, want))
    assert 0 < np.linalg.norm(got - want) < allowed * np.linalg.norm(want)


def _in(model, dtype):
    """The same network, which computes in another dtype."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "dtype") and not isinstance(module, nnx.Linear):
            module.dtype = dtype
    return model
