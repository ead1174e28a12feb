"""The optimizer of an experiment: SGD as in the paper, optionally with momentum or a cosine schedule."""

import optax

from dpnb.experiments import Experiment


def make_optimizer(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the experiment's SGD (paper, appendix: constant learning rate, no momentum)."""
    rate = experiment.learning_rate
    if experiment.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, experiment.steps)
    return optax.sgd(rate, experiment.momentum or None)
