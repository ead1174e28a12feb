"""The privacy statement: what a run promises, to whom, what it does not, and which files may be published."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpnb.privacy.accounting import ACCOUNTANTS, DeltaTooSmall, epsilon
from dpnb.privacy.mechanism import NEIGHBOURS, Mechanism, MissingAccountant, compose, counts_from_json


def privacy_statement(
    events: Sequence[Mapping[str, Any]],
    *,
    delta: float,
    seed_published: bool,
    data_note: str = "",
    pretrained: str = "",
    training_examples: int | None = None,
    exact_noise: bool = False,
) -> str:
    """States in prose what was promised, to whom, and what was not. It never gives an epsilon without its terms.

    Args:
      events: `Ledger.events()`, or the same list from a result record.
      delta: the delta at which epsilon is computed.
      seed_published: whether the seed of the run is, or will be, public.
      data_note: a caveat about the training data, or "".
      pretrained: the data on which the parameters were pre-trained, "" if trained from scratch.
      training_examples: N. If it is given and delta is at least 1/N, the statement has a warning.
      exact_noise: whether sums are exact and both noise and Poisson sampling come from a cryptographic generator, as in
        `dpnb.training`. Otherwise the statement names floating-point arithmetic as a gap.
    Raises:
      ValueError: an event is not one, see `dpnb.privacy.counts_from_json`.

    >>> entry = {"noise_multiplier": 3.0, "sampling_probability": 0.01, "sampler": "poisson", "steps": 100}
    >>> text = privacy_statement([entry], delta=1e-5, seed_published=False)
    >>> print(text.partition(":")[0])
    This run is differentially private, valid for the sampler that ran
    """
    counts = counts_from_json(events)
    if not counts:
        return "No private step was taken: nothing was spent, and nothing was learnt from the data."
    parts = [_claim(counts, delta)]
    if training_examples and delta >= 1 / training_examples:
        parts.append(_large_delta(delta, training_examples))
    if all(m.has_noise for m in counts):
        parts.append(COVERED)
    parts += [
        _seed(seed_published),
        _randomness(counts) if exact_noise else "",
        COUNTED,
        "NOT protected: " + "; ".join(_gaps(pretrained, exact_noise)) + ".",
        _publishable(counts, seed_published),
        f"About the data: {data_note}" if data_note else "",
    ]
    return "\n\n".join(part for part in parts if part)


COVERED = (
    "Covered are all noisy updates, and so every parameter vector and every average computed from them. The "
    "checkpoint files are not covered: beside the parameters they hold exact statistics of the training "
    "data."
)
COUNTED = (
    "This epsilon is that of one run and of one training example. Several released runs on the same data "
    "add up: their epsilons and deltas are summed. A person with k training examples has about k times this "
    "epsilon, at a delta more than k times as large."
)


def _claim(counts: Mapping[Mechanism, int], delta: float) -> str:
    """Whether the run is private, at which epsilon and under which terms."""
    runs = "; then ".join(
        f"{n} updates of noise multiplier sigma = {m.noise_multiplier:g}, sampling probability "
        f"q = {m.sampling_probability:g}, {m.sampler} sampling" for m, n in counts.items()
    )  # fmt: skip
    numbers = []
    try:
        for k in ACCOUNTANTS:
            with contextlib.suppress(DeltaTooSmall):  # RDP can prove an epsilon at any delta
                numbers.append((k, epsilon(compose(counts), 1, delta, k)))
        claim = ", ".join(f"epsilon = {_round_up(e)} ({k.upper()} accountant)" for k, e in numbers)
    except MissingAccountant:
        claim = "epsilon not computed (dp-accounting is not installed here; recompute it from the events)"
    terms = f"{claim}, at delta = {delta:g}, neighbouring relation: {NEIGHBOURS}, for {runs}."
    if not all(m.has_noise for m in counts):
        return (
            "This run is NOT differentially private: there were updates without noise, or with too little "
            f"to be accounted. {terms}"
        )
    if not all(m.is_exactly_accounted for m in counts):
        return (
            f"This run has only a *nominal* privacy claim: {terms} The accountants assume Poisson sampling, "
            "but fixed-size batches of shuffled data were used, for which the true epsilon can be larger. "
            "This is not a guarantee."
        )
    return f"This run is differentially private, valid for the sampler that ran: {terms}"


def _large_delta(delta: float, n: int) -> str:
    """The warning that this delta is too large for n examples."""
    return (
        f"WARNING: delta = {delta:g} is not below 1/N = {1 / n:.3g} (N = {n} training examples). Publishing "
        "one training example, drawn at random, in full would satisfy such a delta, whatever epsilon is: "
        "choose a delta well below 1/N."
    )


def _seed(published: bool) -> str:
    """What follows from the seed being published or secret."""
    what = "must stay secret: who knows it can subtract the noise"
    if published:
        what = "is published: the noise can be computed and subtracted"
    return f"The seed {what}. The guarantee holds only against those who do not know it."


def _randomness(counts: Mapping[Mechanism, int]) -> str:
    """The random generators, and what the guarantee has to do with each."""
    shuffled = " NumPy's Philox generator, which drew the permutations of the shuffled batches, is not cryptographic either."
    return (
        "Randomness: the noise and the Poisson samples come from SHAKE (FIPS 202), a cryptographic "
        "function, keyed with the seed; a secret seed has 256 bits from the operating system. Clipped "
        "gradients are rounded towards zero to a fixed-point grid and summed exactly, as integers, and the "
        "noise is an exactly sampled Gaussian rounded to that grid, which is post-processing of the "
        "Gaussian mechanism that is accounted for. JAX's Threefry generator is not cryptographic; it draws "
        "only the random views of the images and the initial parameters, and the guarantee holds even for "
        "those who "
        "can predict them." + (shuffled if any(m.sampler == "shuffle" for m in counts) else "")
    )


def _gaps(pretrained: str, exact_noise: bool) -> list[str]:
    """Clauses about what is not protected."""
    return [
        "training loss, training accuracy, gradient norms, batch sizes and numbers of clipped, non-finite or unreadable "
        "examples shown or logged during training, which are exact functions of the data",
        "hyper-parameter search: only this run is counted, not the runs that chose its settings",
        "the normalisation constants of the images, the class names and the number of training examples, which are "
        "taken as public",
        "pre-training data: none was used (any would get no protection)"
        if not pretrained
        else f"pre-training data: the run started from parameters pre-trained on {pretrained}, which it does not protect "
        "at all; that no private example was among them is asserted by whoever ran this, and only names and "
        "fingerprints were checked",
        "the choice of the best checkpoint or of the best run by any measure on private data",
        "the examples of the test or validation split, on which the parameters are evaluated without noise",
        *(
            [
                "timing and memory: how long an update takes tells the size of its batch",
                "rounding by place: some processors round by an example's place in its batch, so that taking one example "
                "out may change the last digits of what others add; a run warns where it sees it",
                "attackers who can break SHAKE: they could predict the noise, as the guarantee is computational",
            ]
            if exact_noise
            else [
                "floating-point side channels and timing: noise is drawn in float32 from a pseudo-random "
                "generator that is not cryptographic, and arithmetic is not exact"
            ]
        ),
    ]


def _publishable(counts: Mapping[Mechanism, int], seed_published: bool) -> str:
    """Which files may be published, and on what condition."""
    if seed_published:
        return (
            "Files: publishing the seed presupposes that the data are public. Then every file of this run "
            "may be published; if they are not public, none may."
        )
    kept = (
        "Never publish `private/`: it holds the seed, checkpoints, ledger, training curve, full record and "
        "full notebook, with exact statistics of the training data, an unkeyed hash of them, and some "
        "training images."
    )
    if not all(m.has_noise for m in counts):
        return f"Files: this run gives no guarantee, so none of its files may be published. {kept}"
    basis = (
        "guarantee"
        if all(m.is_exactly_accounted for m in counts)
        else "*nominal* claim, which is not a guarantee,"
    )
    return (
        "Files: those in `release/` may be published: `ema.safetensors` (averaged parameters), "
        "`result.json` (settings, number of updates, accuracy on the evaluation split), `privacy.md` (this "
        "statement) and the executed notebook, if there is one, without the outputs that show training "
        f"data. That rests on the {basis} above, on the seed staying secret (the files name the data only by "
        f"a hash keyed with it), and on what is listed above as public or as not protected. {kept}"
    )


def _round_up(value: float) -> str:
    """The value with three decimals, rounded up, because a stated epsilon is an upper bound."""
    return f"{math.ceil(value * 1000) / 1000:.3f}" if math.isfinite(value) else "infinity"
