"""The privacy statement: no epsilon without its terms, and what is not protected is named."""

import math
import sys

import pytest

from dpnb import statement as module
from dpnb.privacy import Mechanism, epsilon
from dpnb.statement import privacy_statement

DELTA = 1e-5


@pytest.fixture
def no_accountant(monkeypatch):
    """A machine without dp-accounting."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)


class TestStatement:
    EVENTS = [{**vars(Mechanism(10.0, 4096 / 50_000)), "steps": 875}]

    def say(self, events=None, **options):
        return privacy_statement(
            events or self.EVENTS, **{"delta": DELTA, "seed_published": False, **options}
        )

    def test_epsilon_never_without_its_terms(self):
        text = self.say()
        for term in ("0.903 (PLD", "0.988 (RDP", "delta = 1e-05", "add or remove one", "sigma = 10,", "q = 0.08192",
                     "875 updates", "poisson sampling", "is differentially private, valid"):  # fmt: skip
            assert term in text
        assert "nominal" not in text and text.index("epsilon") < text.index("sigma")

    def test_epsilon_is_rounded_up(self):
        assert epsilon(Mechanism(10.0, 4096 / 50_000), 875, DELTA) > 0.9027
        assert module._round_up(0.9021) == "0.903" and module._round_up(0.902) == "0.902"
        assert module._round_up(math.inf) == "infinity"

    def test_names_what_is_not_protected(self):
        text = self.say()
        gaps = text[text.index("NOT protected:") :]
        for gap in ("training loss", "training accuracy", "gradient norms", "batch sizes", "hyper-parameter search",
                    "normalisation constants", "number of examples", "pre-training data", "choice of the best checkpoint",
                    "test or validation", "floating-point side channels", "not cryptographic"):  # fmt: skip
            assert gap in gaps

    def test_nominal(self):
        shuffled = [{**vars(Mechanism(10.0, 4096 / 50_000, "shuffle")), "steps": 875}]
        for events in (shuffled, self.EVENTS + shuffled):
            text = self.say(events)
            assert "*nominal*" in text and "not a guarantee" in text and "shuffle sampling" in text
            assert "is differentially private" not in text

    def test_not_private(self):
        text = self.say([*self.EVENTS, {**vars(Mechanism(0.0, 0.1)), "steps": 1}])
        assert "NOT differentially private" in text and "epsilon = infinity (PLD" in text
        assert "This run is differentially private" not in text

    def test_seed(self):
        assert "seed is published: the noise can be computed" in self.say(seed_published=True)
        assert "seed must stay secret" in self.say() and "published" not in self.say()
        for published in (True, False):
            assert "only against those who do not know it" in self.say(seed_published=published)

    def test_pre_training_and_data(self):
        assert "none was used" in self.say() and "About the data" not in self.say()
        text = self.say(pretrained="ImageNet-32", data_note="a made-up set")
        assert "pre-trained on ImageNet-32" in text and text.endswith("About the data: a made-up set")

    def test_without_dp_accounting(self, no_accountant):
        text = self.say()
        assert "epsilon not computed" in text and "sigma = 10," in text and "epsilon =" not in text

    def test_nothing_done(self):
        assert "No private step" in privacy_statement([], delta=DELTA, seed_published=False)
