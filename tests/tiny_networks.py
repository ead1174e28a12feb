"""Normaliser-free networks that compile quickly, and models whose parameters cost no compilation."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpnb.models import NFNet, NFResNet, WideResNet, nf_resnet, nfnet, wide_resnet


def _two_stages(network, module):
    def make(rngs, **options):
        with mock.patch.object(module, "WIDTHS", module.WIDTHS[:2]):
            return network((1, 2), 5, width=0.0625, rngs=rngs, **options)

    return make


# The first two of four stages, which hold every kind of block: projected at stride 1, projected at stride 2, and with
# the identity as its shortcut; in the NFNet also convolutions of one group and of two.
small_nf_resnet = _two_stages(NFResNet, nf_resnet)
small_nfnet = _two_stages(NFNet, nfnet)


def small_wide_resnet(rngs):
    """The first two of three stages, projected at strides 1 and 2."""
    with mock.patch.object(wide_resnet, "STAGES", wide_resnet.STAGES[:2]):
        return WideResNet(10, 1, rngs=rngs)


def filled(make, seed: int = 0) -> nnx.Module:
    """The model that `make(rngs)` builds, but with parameters drawn by NumPy, which compiles nothing.

    It must keep no random streams. Kernels are as large as usual; every gain, bias and scale is random, around 1.
    """
    rng = np.random.default_rng(seed)

    def draw(p):
        normal = rng.standard_normal(p.shape)
        size = normal / np.sqrt(np.prod(p.shape[:-1])) if len(p.shape) > 1 else 1 + 0.1 * normal
        return jnp.asarray(size, p.dtype)

    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(seed))))
    return nnx.merge(graph, jax.tree.map(draw, state))
