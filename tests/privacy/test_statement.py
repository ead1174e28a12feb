"""The privacy statement: no epsilon without its terms, and what is not protected is named."""

import math
import sys

import pytest

from dpnb.privacy import Mechanism, epsilon, privacy_statement
from dpnb.privacy import statement as module

DELTA = 1e-5


@pytest.fixture
def no_accountant(monkeypatch):
    """A machine without dp-accounting."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)


class TestStatement:
    EVENTS = [{**vars(Mechanism(10.0, 4096 / 50_000)), "steps": 875}]
    SHUFFLED = [{**vars(Mechanism(10.0, 4096 / 50_000, "shuffle")), "steps": 875}]
    NOISELESS = [*EVENTS, {**vars(Mechanism(0.0, 0.1)), "steps": 1}]

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

    def test_a_delta_too_small_for_pld_leaves_rdp(self):
        text = self.say(delta=1e-15)
        assert (
            "(RDP accountant)" in text
            and "PLD accountant" not in text
            and "is differentially private" in text
        )

    def test_names_what_is_not_protected(self):
        gaps = ("training loss", "training accuracy", "gradient norms", "batch sizes", "hyper-parameter search",
                "normalisation constants", "number of training examples", "pre-training data",
                "choice of the best checkpoint", "test or validation", "timing")  # fmt: skip
        for text in (self.say(), self.say(exact_noise=True)):
            (paragraph,) = [p for p in text.split("\n\n") if p.startswith("NOT protected:")]
            assert not [gap for gap in gaps if gap not in paragraph]

    def test_generators_and_arithmetic(self):
        """Exact noise is claimed only where it was drawn: other loops and older records have the gap."""
        text, old = self.say(exact_noise=True), self.say()
        gap = "noise is drawn in float32 from a pseudo-random generator that is not cryptographic"
        assert gap in old and "SHAKE" not in old
        assert gap not in text and "floating-point" not in text
        for said in ("SHAKE (FIPS 202), a cryptographic function", "summed exactly", "Threefry generator is not crypto",
                     "guarantee is computational", "how long an update takes tells the size"):  # fmt: skip
            assert said in text
        assert "Philox" not in text
        assert "Philox" in self.say(self.SHUFFLED, exact_noise=True)

    def test_checkpoint_files_are_not_covered(self):
        (covered,) = [p for p in self.say().split("\n\n") if p.startswith("Covered")]
        assert "checkpoint files are not covered" in covered and "average and checkpoint" not in covered
        assert "Covered" not in self.say(self.NOISELESS)

    def test_delta_beside_the_number_of_examples(self):
        """A delta of 1/N or more is met by publishing one example, so it is said aloud."""
        for n, warned in ((100_000, True), (200_000, True), (99_999, False), (50_000, False), (None, False)):
            assert ("not below 1/N" in self.say(training_examples=n)) == warned, n
        assert "1/N = 5e-06 (N = 200000" in self.say(training_examples=200_000)

    def test_what_adds_up(self):
        text = self.say()
        assert "Several released runs on the same data add up" in text
        assert "person with k training examples has about k times this epsilon" in text

    def test_files_that_may_be_published(self):
        text = self.say()
        for said in ("those in `release/` may be published", "rests on the guarantee", "seed staying secret",
                     "Never publish `private/`"):  # fmt: skip
            assert said in text
        for name in ("ema.safetensors", "result.json", "privacy.md", "notebook"):
            assert name in text[text.index("Files:") : text.index("Never publish")]
        nominal, noiseless = self.say(self.SHUFFLED), self.say(self.NOISELESS)
        assert "rests on the *nominal* claim, which is not a guarantee" in nominal
        assert "none of its files may be published" in noiseless and "may be published:" not in noiseless
        public = self.say(seed_published=True)
        assert "presupposes that the data are public" in public and "release/" not in public

    def test_nominal(self):
        for events in (self.SHUFFLED, self.EVENTS + self.SHUFFLED):
            text = self.say(events)
            assert "*nominal*" in text and "not a guarantee" in text and "shuffle sampling" in text
            assert "is differentially private" not in text

    def test_not_private(self):
        text = self.say(self.NOISELESS)
        assert "NOT differentially private" in text and "epsilon = infinity (PLD" in text
        assert "This run is differentially private" not in text

    def test_seed(self):
        assert "seed is published: the noise can be computed" in self.say(seed_published=True)
        assert "seed must stay secret" in self.say() and "seed is published" not in self.say()
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
