"""ImageNet and Places-365: every number of the paper that is known, what it costs, or why nobody can run it.

Names are `imagenet/scratch/...`, `imagenet/finetune/WEIGHTS-WHAT/epsE` and `places365/finetune/...`. The paper
fine-tunes networks that saw JFT-300M, which was never released. Public weights cannot simply take their
place: those of ImageNet saw the private images themselves, and so did those of ImageNet-21k, which contains
them (`dpnb.models.weights.provenance` refuses both). What can: networks pre-trained on Places-365, for ImageNet;
and networks of ImageNet or ImageNet-21k, for Places-365.
"""

from dpnb.experiments.experiment import Experiment

JFT = (
    "its network saw JFT-300M, which was never released; in public: imagenet/finetune/places365-all and "
    "-classifier (no ImageNet photograph in the weights)"
)
DELTA = 8e-7
# Multiply-adds of one forward view (XLA's count, see tests/experiments/test_imagenet.py), by network and pixels.
FORWARD = {
    ("nf-resnet", 50, 224): 4.031e9, ("nf-resnet-timm", 50, 224): 4.031e9, ("nf-resnet", 200, 224): 14.67e9,
    ("nfnet-f3", 0, 320): 67.09e9,
}  # fmt: skip
# FLOP of one view forward and backward at full scale, XLA's count, too; a multiply-add is two.
FLOPS = {
    ("nf-resnet", 50, 224): 23.96e9, ("nf-resnet-timm", 50, 224): 23.95e9, ("nf-resnet", 200, 224): 87.78e9,
    ("nfnet-f3", 0, 320): 402.9e9,
}  # fmt: skip
EXAMPLES = {"imagenet2012": 1_281_167, "places365_small": 1_803_460}

_BASE = dict(
    dataset="imagenet2012", image_size=224, network="nf-resnet", depth=50, width=1, delta=DELTA, augmult=4,
    expected_batch_size=16_384, learning_rate=4.0, ema_decay=0.99999, compute_dtype="bfloat16", eval_every=1000,
)  # fmt: skip
_HIGH = "paper, ImageNet from scratch (unverified: recalled with confidence, not checked against the PDF)"
_V1 = "paper, version 1, ImageNet from JFT"
_V2 = "paper, abstract of version 2"
_RECALLED = "paper, version 2, ImageNet from JFT (unverified: recalled vaguely, not checked against the PDF)"
_OURS = "not in the paper: {}; all settings are ours, and untuned"
# The last layer alone: all images in every update, on features that are computed once.
_CLASSIFIER = dict(
    trainable="classifier", augmult=0, steps=200, momentum=0.9, learning_rate=8.0, ema_decay=0.9
)
_ALL = dict(trainable="all", steps=2000, learning_rate=1.0, ema_decay=0.999)
_JFT_200 = dict(depth=200, pretrained="nf-resnet-200-jft", impossible=JFT)
_JFT_F3 = dict(network="nfnet-f3", depth=0, image_size=320, pretrained="nfnet-f3-jft", impossible=JFT)
_PLACES = dict(dataset="places365_small", delta=5e-7)


def _cell(name: str, epsilon: float, source: str, mean: float | None = None, **changes) -> Experiment:
    e = Experiment(name=f"{name}/eps{epsilon:g}", epsilon=epsilon, paper_source=source, paper_mean=mean)
    e = e.replace(**{**_BASE, "steps": 71_589, **changes})
    if e.trainable == "classifier":
        e = e.replace(expected_batch_size=EXAMPLES[e.dataset], physical_batch_size=8192)
    return e


TABLE = [
    _cell("imagenet/scratch/nf-resnet-50", 8.0, _HIGH, 32.4),
    *[_cell("imagenet/finetune/nf-resnet-200-jft", e, _V1, mean, **_ALL, **_JFT_200) for e, mean in ((1.0, 77.1), (8.0, 81.1))],
    *[
        _cell("imagenet/finetune/nfnet-f3-jft", e, source, mean, **_ALL, **_JFT_F3)
        for e, source, mean in (
            (0.5, _V2, 83.8), (1.0, _RECALLED, 84.4), (2.0, _RECALLED, 85.1), (4.0, _RECALLED, 85.8), (8.0, _V2, 86.7),
        )
    ],
    *[
        _cell(
            f"imagenet/finetune/places365-{what}", e, _OURS.format("public weights that saw no ImageNet photograph"),
            pretrained="runs/pretrain/places365/paper-seed0/ema.safetensors", **changes,
        )
        for what, changes in (("all", _ALL), ("classifier", _CLASSIFIER))
        for e in (0.5, 1.0, 8.0)
    ],
    _cell(
        "places365/finetune/nf-resnet-50-all", 8.0,
        "paper, Places-365 from ImageNet (unverified: about 55, recalled vaguely; which network is not known)", 55.0,
        network="nf-resnet-timm", pretrained="nf-resnet-50-imagenet", **_ALL, **_PLACES,
    ),
    _cell(
        "places365/finetune/nf-resnet-50-classifier", 8.0, _OURS.format("the last layer alone"),
        network="nf-resnet-timm", pretrained="nf-resnet-50-imagenet", **_CLASSIFIER, **_PLACES,
    ),
    *[
        _cell(
            f"places365/finetune/nfnet-f3-{what}", 8.0, _OURS.format("the authors' weights of ImageNet-21k"),
            network="nfnet-f3", depth=0, image_size=320, pretrained="nfnet-f3-imagenet21k", **changes, **_PLACES,
        )
        for what, changes in (("all", _ALL), ("classifier", _CLASSIFIER))
    ],
]  # fmt: skip


def preset_overrides(experiment: Experiment, preset: str) -> dict:
    """The changes that a preset makes. Below "paper" the network is a narrow NF-ResNet at few pixels,
    and what is fine-tuned begins with weights from random textures.

    smoke: a few updates; teach: two CPU cores, some minutes, few photographs; colab: one small GPU.
    """
    if preset == "paper":
        return {}
    e = experiment
    small = dict(network="nf-resnet", depth=14, width=0.25, image_size=64, compute_dtype="float32")
    if e.pretrained:
        small["pretrained"] = "nf-resnet-14-textures"
    if e.trainable == "classifier":
        size = {"smoke": 40, "teach": 200, "colab": 10_000}[preset]
        physical = min(size, 200)
        small |= dict(learning_rate=0.3, steps=50, expected_batch_size=size, eval_every=10)
        return small | dict(physical_batch_size=physical)
    if preset == "colab":
        large = {} if e.pretrained else dict(depth=50, width=0.5, image_size=128)
        return small | dict(steps=1000, expected_batch_size=2048, ema_decay=0.999) | large
    size, steps, every = {"smoke": (16, 3, 1), "teach": (100, 60, 10)}[preset]
    small |= dict(steps=steps, expected_batch_size=size, eval_every=every, learning_rate=0.5, ema_decay=0.9)
    return small | dict(augmult=2, physical_batch_size=4)
