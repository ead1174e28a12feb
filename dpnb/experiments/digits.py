"""The embedded demonstration: scikit-learn's digits, nothing to download, about a minute."""

from dpnb.experiments.experiment import Experiment

TABLE = [
    Experiment(
        name="digits/demo",
        dataset="digits",
        depth=10,
        width=1,
        epsilon=8.0,
        delta=1e-4,
        steps=150,
        expected_batch_size=150,
        augmult=1,
        learning_rate=2.0,
        physical_batch_size=16,
        eval_every=15,
        eval_examples=297,
        paper_source="not in the paper: a demonstration on 1,500 training images",
    )
]
PRESETS = {
    "smoke": dict(steps=60),
    "teach": {},
    "colab": dict(augmult=4),
    "paper": dict(augmult=16),
}


def preset_overrides(experiment: Experiment, preset: str) -> dict:
    """The changes that a preset makes."""
    return PRESETS[preset]
