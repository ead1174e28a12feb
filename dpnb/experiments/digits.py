"""The embedded demonstration on scikit-learn's digits, nothing to download: what a smaller epsilon costs.

`digits/demo/*` is a linear layer on scattering features, seconds each; `digits/wrn-10-1` the Wide-ResNet of the
CIFAR-10 notebook, a minute.
"""

from dpnb.experiments.experiment import Experiment

INFINITE = float("inf")
WHY = "not in the paper: a demonstration on 1,500 training images"


def _demo(name: str, epsilon: float, learning_rate: float, **changes) -> Experiment:
    return Experiment(
        name=f"digits/demo/{name}",
        dataset="digits",
        network="scatter-linear",
        epsilon=epsilon,
        delta=1e-4,
        steps=40,
        expected_batch_size=500,
        augmult=0,
        learning_rate=learning_rate,
        ema_decay=0.9,
        physical_batch_size=16,
        eval_every=0,
        paper_source=WHY,
        **changes,
    )


# Clip norm and learning rates: by the accuracy on 300 held-out training images, a few seeds each. Gradients that
# nothing clips are some hundred times longer.
DEMO = [
    _demo("eps1", 1.0, 0.5),
    _demo("eps3", 3.0, 0.5),
    _demo("eps8", 8.0, 1.0),
    _demo("not-private", INFINITE, 0.005, noise_multiplier=0.0, clip_norm=INFINITE),
]
WRN = Experiment(
    name="digits/wrn-10-1",
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
    paper_source=WHY,
)
TABLE = [*DEMO, WRN]
STUDIES = {"digits/demo": "demo.ipynb"}
PRESETS = {
    "smoke": dict(steps=60),
    "teach": {},
    "colab": dict(augmult=4),
    "paper": dict(augmult=16),
}


def preset_overrides(experiment: Experiment, preset: str) -> dict:
    """The changes that a preset makes: none to the linear layer, which takes seconds."""
    return {} if experiment.on_features else PRESETS[preset]
