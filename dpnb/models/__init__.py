"""The networks, the table that lists them, and how an NNX model becomes a pure function of its parameters.

Importing this package is cheap: JAX is loaded with the first model that is used.
"""

from typing import TYPE_CHECKING

from dpnb import lazy
from dpnb.models.registry import NETWORKS, Network

if TYPE_CHECKING:  # at run time each is imported when it is first used
    from dpnb.models.checks import DrawsRandomNumbers, MixesExamples, check_deterministic, check_independent
    from dpnb.models.nf_resnet import NFResNet
    from dpnb.models.nfnet import NFNet
    from dpnb.models.patches import PatchLinear
    from dpnb.models.pure import functional, structure
    from dpnb.models.scattering import ScatterLinear
    from dpnb.models.wide_resnet import WideResNet

__all__ = [
    "NETWORKS", "DrawsRandomNumbers", "MixesExamples", "NFNet", "NFResNet", "Network", "PatchLinear", "ScatterLinear",
    "WideResNet", "check_deterministic", "check_independent", "functional", "structure",
]  # fmt: skip

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "DrawsRandomNumbers": "dpnb.models.checks", "MixesExamples": "dpnb.models.checks",
        "check_deterministic": "dpnb.models.checks", "check_independent": "dpnb.models.checks",
        "functional": "dpnb.models.pure", "structure": "dpnb.models.pure", "NFNet": "dpnb.models.nfnet",
        "NFResNet": "dpnb.models.nf_resnet", "PatchLinear": "dpnb.models.patches",
        "ScatterLinear": "dpnb.models.scattering", "WideResNet": "dpnb.models.wide_resnet",
    },
)  # fmt: skip
