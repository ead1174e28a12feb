"""Training without privacy on public images, for networks that are then fine-tuned privately.

The same networks as everywhere (no layer mixes examples), without clipping and noise: epsilon is infinite
*for the public images*. PAPER.md's checkpoints were trained on ImageNet at 32x32 and on CIFAR-100.
"""

from dpnb.experiments.experiment import Experiment


def _cell(data: str, dataset: str, depth: int, width: int, epochs_of: int, source: str, **more) -> Experiment:
    return Experiment(
        name=f"pretrain/{data}",
        dataset=dataset,
        depth=depth,
        width=width,
        epsilon=float("inf"),
        noise_multiplier=0.0,
        clip_norm=float("inf"),
        steps=90 * epochs_of // 1024,
        expected_batch_size=1024,
        augmult=1,
        learning_rate=0.4,
        momentum=0.9,
        schedule="cosine",
        ema_decay=0.9995,
        eval_every=1000,
        paper_source=source,
        **more,
    )


_OURS = "not in the paper: {}; the optimiser's settings are ours"
TABLE = [
    _cell("imagenet32", "imagenet_resized/32x32", 28, 10, 1_281_167, _OURS.format("as its WRN-28-10 of ImageNet at 32x32")),
    _cell("cifar100", "cifar100", 40, 4, 50_000, _OURS.format("as its WRN-40-4 of CIFAR-100")),
    _cell("tiny-imagenet32", "tiny_imagenet32", 16, 4, 100_000, _OURS.format("a smaller public set")),
    _cell("textures", "textures", 16, 4, 60_000, _OURS.format("no real image at all, after Tang et al. 2023")),
    _cell("textures-nf", "textures", 50, 1, 60_000, _OURS.format("no real image, for photographs"), network="nf-resnet"),
    _cell(
        "places365", "places365_small", 50, 1, 1_803_460, _OURS.format("photographs that are not ImageNet's"),
        network="nf-resnet", image_size=224, compute_dtype="bfloat16",
    ),
]  # fmt: skip


def preset_overrides(experiment: Experiment, preset: str) -> dict:
    """The changes that a preset makes: WRN-10-2 on CPUs, WRN-16-4 on a small GPU."""
    cpu = dict(expected_batch_size=256, learning_rate=0.1, physical_batch_size=32)
    nf = experiment.network == "nf-resnet"
    small, smallest = (
        dict(depth=14, width=w) if nf else dict(depth=10, width=int(8 * w)) for w in (0.25, 0.125)
    )
    steps = 300 if nf else 1000 if experiment.dataset == "textures" else 2000  # an hour on two cores at most
    return {
        "smoke": dict(cpu, **smallest, steps=12, expected_batch_size=128, eval_every=4, eval_examples=500),
        "teach": dict(cpu, **small, steps=steps, ema_decay=0.99, eval_every=250, eval_examples=2000),
        "colab": dict(
            **({} if nf else dict(depth=16, width=4)),
            steps=min(experiment.steps, 10_000),
        ),
        "paper": {},
    }[preset]
