"""What others report on CIFAR-10 without extra data, delta = 1e-5: rows to put beside ours.

`source` says where a number was read; "unverified" that it was recalled and not checked. A number
that nobody has is not here.
"""

from typing import NamedTuple

UNVERIFIED = "unverified: recalled, not checked against the paper"
RERUN = "re-run by Bao & Bindschaedler 2024 (ACSAC)"


class Reported(NamedTuple):
    """Test accuracy (percent) of one method at one epsilon; std over runs, None where unknown."""

    method: str
    epsilon: float
    mean: float
    std: float | None
    source: str
    when: str  # "earlier", "re-run" of the paper, or "later"


def _row(method, when, source, **by_epsilon) -> list[Reported]:
    made = []
    for key, value in by_epsilon.items():
        mean, std = value if isinstance(value, tuple) else (value, None)
        made.append(Reported(method, float(key[1:].replace("_", ".")), mean, std, source, when))
    return made


CIFAR10 = [
    *_row("tempered sigmoids (Papernot 2021)", "earlier", "as quoted by later work", e7_53=66.2),
    *_row("Dormann 2021", "earlier", "as quoted in Bao & Bindschaedler 2024, table 4",
          e1_93=(58.6, 0.38), e4_21=(66.2, 0.38), e7_42=(70.1, 0.20)),
    *_row("ScatterNet + linear (Tramer & Boneh 2021)", "earlier", "the authors' README", e3=67.0),
    *_row("ScatterNet + CNN (Tramer & Boneh 2021)", "earlier", "the authors' README", e3=69.3),
    *_row("ScatterNet + CNN (Tramer & Boneh 2021), re-run", "earlier", RERUN + ", table 11",
          e1=(60.88, 0.33), e2=(66.96, 0.56), e4=(69.74, 0.24), e8=(72.40, 0.11)),
    *_row("ScaleNorm ResNet-9 (Klause 2022, v1)", "earlier", "as quoted by later work", e7_5=71.7),
    *_row("WRN-16-4, the paper's recipe, re-run", "re-run", RERUN + ", table 11; no weight standardisation",
          e1=(56.80, 0.49), e2=(62.90, 0.32), e4=(69.45, 0.41), e8=(78.74, 0.45)),
    *_row("ScaleNorm + the paper's recipe (Klause 2022, v2)", "later", "abstract of 2203.00324v2", e8=82.5),
    *_row("SmoothNet (Remerscheid 2022)", "later", "the authors' plot script",
          e1=62.6, e3=70.0, e7=73.5, e10=73.8),
    *_row("DP-MixSelf (Bao 2023)", "later", RERUN, e1=57.24, e8=(78.49, 0.21)),
    *_row("DP-RandP, prior of random images (Tang 2023)", "later", "abstract", e1=72.3),
]  # fmt: skip

# WRN-16-4 at epsilon 8, batches of 4,096, 200 epochs, without weight standardisation.
ORDER_SOURCE = "Bao & Bindschaedler 2024 (ACSAC), table 6"
LAYER_ORDER = {  # (order, self-augmentation and EMA): (mean, std)
    ("ReLU then norm", False): (71.68, 0.50),
    ("ReLU then norm", True): (77.79, 0.50),
    ("norm then ReLU", False): (65.74, 0.40),
    ("norm then ReLU", True): (68.87, 0.80),
}
