"""What is held against the data before anything is compiled, timed or spent."""

import pytest
import shared_runs
import tiny

from dpnb import results, sweep, training


def test_an_experiment_is_trained_on_the_data_that_it_names(tmp_path):
    """Its record would name others; nothing is charged."""
    with pytest.raises(ValueError, match="tiny must be trained on random, got bands; .* dataset='bands'"):
        training.train(tiny.experiment(), shared_runs.bands(), tmp_path, model=shared_runs.linear())
    assert not results.load(tmp_path) and not [*tmp_path.rglob("ledger.jsonl")]


def test_a_sweep_says_which_cells_are_of_other_data(tmp_path):
    """They fail, each in a line, and leave no record."""
    made = sweep.run([tiny.experiment()], shared_runs.bands(), tmp_path, say=lambda text: None)
    ((label, why),) = made.failures.items()
    assert not made.records and "must be trained on random, got bands" in why and label == "tiny, seed 0"


def test_accuracy_is_of_the_images_that_the_record_will_name(tmp_path):
    """60 test images are not 30 that were held out."""
    e = tiny.experiment(dataset="bands", validation=30)
    with pytest.raises(ValueError, match="must report on 30 held-out training images, got 60 images"):
        training.train(e, shared_runs.bands(), tmp_path, model=shared_runs.linear())


def test_a_sweep_reads_one_data_set():
    with pytest.raises(ValueError, match=r"reads one data set, got those of .* \(cifar10, cifar100\)"):
        sweep.plan("cifar*/finetune/all/eps1", "teach")
    assert len(sweep.plan("cifar10/finetune/*/eps1", "teach")) > 1
