"""Sums of clipped per-example gradients for any JAX model. This package can be used without the rest of dpnb."""

from dpnb.gradients.batching import per_example
from dpnb.gradients.clipping import FORMS, ClippedGrad, choose_form, clipped_grad
from dpnb.gradients.convolution import FORMULATIONS, conv_general_dilated, formulation, formulation_in_force
from dpnb.gradients.group_norm import group_norm

__all__ = [
    "FORMS", "FORMULATIONS", "ClippedGrad", "choose_form", "clipped_grad", "conv_general_dilated", "formulation",
    "formulation_in_force", "group_norm", "per_example",
]  # fmt: skip
