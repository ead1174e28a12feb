"""The studies behind the CIFAR-10 table (paper, section on CIFAR-10 without extra data): what each
part of the recipe is worth. Names are `cifar10/STUDY/CELL`; one notebook shows each study.

At preset "paper" all build on WRN-16-4 at (8, 1e-5), 2,468 updates of 4,096 images, K = 16. The
paper shows these studies as figures whose values are not public as numbers, so `paper_mean` is None.
"""

from dpnb.experiments import cifar10
from dpnb.experiments.experiment import Experiment

STUDIES = {
    "ablation": "cifar10_ablation.ipynb",
    "batch": "cifar10_batch_noise_steps.ipynb",
    "augmult": "cifar10_augmult.ipynb",
    "depth-width": "cifar10_depth_width.ipynb",
    "lr-clip": "cifar10_lr_clip.ipynb",
}
FULL = next(e for e in cifar10.TABLE if e.name == "cifar10/wrn-16-4/eps8")


def _cell(name: str, source: str, **changes) -> Experiment:
    base = dict(name=f"cifar10/{name}", paper_mean=None, paper_std=None, paper_source=source)
    return FULL.replace(**base, **changes)


_FIGURE = "paper, figure on {}: its values are not public as numbers"

# From nothing to the whole recipe, one technique at a time, in the paper's order. Where the paper
# does not say what the baseline's batch is, a quarter of the large one stands here.
_LADDER = [
    ("no-norm", dict(norm="none", standardised=False, augmult=0, ema_decay=0.0, expected_batch_size=1024)),
    ("group-norm", dict(norm="group")),
    ("large-batch", dict(expected_batch_size=4096)),
    ("weight-standardisation", dict(standardised=True)),
    ("augmult", dict(augmult=16)),
    ("ema", dict(ema_decay=0.9999)),
]


def _ablation() -> list[Experiment]:
    made, so_far = [], {}
    for number, (name, change) in enumerate(_LADDER):
        so_far = {**so_far, **change}
        made.append(_cell(f"ablation/{number}-{name}", _FIGURE.format("the techniques"), **so_far))
    order = "not in the paper's figure; re-runs found the order worth 6 to 9 points"
    no_views = dict(augmult=0, ema_decay=0.0)
    made += [
        _cell("ablation/order-norm-then-relu", order, relu_first=False),
        _cell("ablation/order-norm-then-relu-plain", order, relu_first=False, **no_views),
        _cell("ablation/order-relu-then-norm-plain", order, **no_views),
    ]
    why = "not in the paper: where the accuracy goes, step by step, at epsilon = infinity"
    free = dict(epsilon=float("inf"), noise_multiplier=0.0)
    made += [
        # Gradients that nothing clips are several times longer: learning rate 2 diverges. At preset teach,
        # with 5,000 images held out, 0.1, 0.2, 0.5 and 1 gave 23, 34, 39 and 40 % (one seed each).
        _cell("ablation/private-none", why, **free, clip_norm=float("inf"), learning_rate=0.5),
        _cell("ablation/private-clip", why, **free),
    ]
    return made


_B = "batch size, noise and number of updates"
TABLE = [
    *_ablation(),
    *[
        _cell(f"batch/b{b}", _FIGURE.format(_B), expected_batch_size=b)
        for b in (256, 512, 1024, 2048, 4096, 8192)
    ],
    *[
        _cell(f"batch/t{t}", _FIGURE.format(_B), steps=t)
        for t in (156, 312, 625, 1250, 2500, 5000)
    ],
    *[  # constant B / sigma, so that epsilon differs between cells
        _cell(
            f"batch/tan-b{b}", "not in the paper: the scaling rule of Sander et al. 2023 (TAN)",
            expected_batch_size=b, noise_multiplier=3.0 * b / 4096, epsilon=None,
        )
        for b in (256, 512, 1024, 2048, 4096)
    ],
    *[_cell(f"augmult/k{k}", _FIGURE.format("augmentation multiplicity"), augmult=k) for k in (0, 1, 2, 4, 8, 16, 32)],
    *[_cell(f"depth-width/d{d}", _FIGURE.format("depth"), depth=d) for d in (10, 16, 22, 28, 40)],
    *[_cell(f"depth-width/w{w}", _FIGURE.format("width"), width=w) for w in (1, 2, 4, 8)],
    *[
        _cell(f"lr-clip/lr{lr:g}-c{c:g}", _FIGURE.format("learning rate and clipping norm"), learning_rate=lr, clip_norm=c)
        for lr in (0.5, 1.0, 2.0, 4.0, 8.0)
        for c in (0.1, 1.0, 10.0)
    ],
]  # fmt: skip


def preset_overrides(experiment: Experiment, preset: str) -> dict:
    """The changes that bring a cell to a preset's scale; what the study varies stays in proportion.

    smoke: WRN-10-1, a few updates, for trying the pipeline end to end. teach: WRN-10-1 on two CPU cores, two
    minutes a cell and more with K, a scale at which the larger effects show. colab: WRN-16-4 with
    half the batch and a fifth of the updates, for one small GPU.
    """
    e, (_, study, cell) = experiment, experiment.name.split("/")
    if preset == "paper":
        return {}
    shrink, shorten, views = {"smoke": (32, 80, 1), "teach": (8, 32, 2), "colab": (2, 5, 4)}[preset]
    changes = dict(
        expected_batch_size=max(e.expected_batch_size // shrink, 8),
        steps=max(e.steps // shorten, 2),
        augmult=min(e.augmult, views),
        eval_every=0,
    )
    if study == "augmult":
        changes["augmult"] = {"smoke": min(e.augmult, 2), "teach": min(e.augmult, 8)}.get(preset, e.augmult)
    if study == "batch" and e.noise_multiplier is not None:  # constant B / sigma, so sigma shrinks with B
        changes["noise_multiplier"] = e.noise_multiplier / shrink
    if preset == "colab":
        return changes
    depth, width = 10, 1
    if study == "depth-width":
        depth, width = (min(e.depth, 22), 1) if cell.startswith("d") else (10, min(e.width, 4))
    call = max(16 // max(changes["augmult"], 1), 2)  # examples: about 16 views, the fastest on two cores
    return {**changes, "depth": depth, "width": width, "physical_batch_size": call}
