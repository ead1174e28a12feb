"""Training: an update's compiled pieces, the loop that pays for each, checkpoints, evaluation and cost."""

from dpnb.training.checks import UnsoundTrainer, check_trainer
from dpnb.training.cost import Cost, predict
from dpnb.training.curve import accounting_grid, epsilon_spent
from dpnb.training.evaluation import Evaluation, make_evaluate
from dpnb.training.loop import Run, train
from dpnb.training.session import Session, calibrate, prepare
from dpnb.training.state import Accumulator, BatchMetrics, State
from dpnb.training.update import Trainer, make_trainer, one_update

__all__ = [
    "Accumulator", "BatchMetrics", "Cost", "Evaluation", "Run", "Session", "State", "Trainer", "UnsoundTrainer",
    "accounting_grid", "calibrate", "check_trainer", "epsilon_spent", "make_evaluate", "make_trainer",
    "one_update", "predict", "prepare", "train",
]  # fmt: skip
