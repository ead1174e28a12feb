"""The privacy statement: what a run promises, to whom, and what it does not, in prose."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpnb.privacy import ACCOUNTANTS, NEIGHBOURS, MissingAccountant, compose, counts_from_json, epsilon


def privacy_statement(
    events: Sequence[Mapping[str, Any]],
    *,
    delta: float,
    seed_published: bool,
    data_note: str = "",
    pretrained: str = "",
) -> str:
    """What was promised, to whom, and what was not, in prose. Never an epsilon without its terms.

    Args:
      events: `Ledger.events()`, or the same from a result record.
      delta: the delta at which epsilon is read.
      seed_published: whether the seed of the run is, or will be, public.
      data_note: a caveat about the training data, "" if none.
      pretrained: what the parameters were pre-trained on, "" if from scratch.
    """
    counts = counts_from_json(events)
    if not counts:
        return "No private step was taken: nothing was spent, and nothing was learnt from the data."
    runs = "; then ".join(
        f"{n} updates of noise multiplier sigma = {m.noise_multiplier:g}, sampling probability "
        f"q = {m.sampling_probability:g}, {m.sampler} sampling" for m, n in counts.items()
    )  # fmt: skip
    private = all(m.private for m in counts)
    valid = all(m.valid for m in counts)
    try:
        numbers = [(k, epsilon(compose(counts), 1, delta, k)) for k in ACCOUNTANTS]
        claim = ", ".join(f"epsilon = {_round_up(e)} ({k.upper()} accountant)" for k, e in numbers)
    except MissingAccountant:
        claim = "epsilon not computed (dp-accounting is not installed here; recompute it from the events)"
    terms = f"{claim}, at delta = {delta:g}, neighbouring relation: {NEIGHBOURS}, for {runs}."
    if not private:
        head = (
            "This run is NOT differentially private: there were updates without noise, or with too little "
            f"to be accounted. {terms}"
        )
    elif not valid:
        head = (
            f"This run has only a *nominal* privacy claim: {terms} The accountants assume Poisson "
            "sampling, but fixed-size batches of shuffled data were used, for which the true epsilon "
            "can be larger. This is not a guarantee."
        )
    else:
        head = f"This run is differentially private, valid for the sampler that ran: {terms}"
    seed = "The seed is published: the noise can be computed and subtracted, so the guarantee holds only "
    if not seed_published:
        seed = "The seed must stay secret: who knows it can subtract the noise. The guarantee holds only "
    pretraining = (
        f"pre-training data: the run started from parameters pre-trained on {pretrained}, which get no "
        "protection at all from it; that none of the private examples was among them is the word of whoever ran "
        "this, as far as names and fingerprints do not show it"
        if pretrained
        else "pre-training data: none was used (where there is some, it gets no protection)"
    )
    gaps = [
        "training loss, training accuracy, gradient norms, batch sizes and numbers of clipped, non-finite or unreadable examples shown or logged during training, "
        "which are exact functions of the data",
        "hyper-parameter search: only this run is counted, not the runs that chose its settings",
        "the normalisation constants of the images, the class names and the number of examples, "
        "which are taken as public",
        pretraining,
        "the choice of the best checkpoint or of the best run by any measure on private data",
        "the examples of the test or validation split, which are evaluated on without any noise",
        "floating-point side channels and timing: noise is drawn in float32 from a pseudo-random generator "
        "that is not cryptographic, and arithmetic is not exact",
    ]
    parts = [
        head,
        "Covered are all noisy updates, hence every parameter vector, average and checkpoint made from them.",
        f"{seed}against those who do not know it.",
        "NOT protected: " + "; ".join(gaps) + ".",
    ]
    return "\n\n".join([*parts, f"About the data: {data_note}"] if data_note else parts)


def _round_up(value: float) -> str:
    """Three decimals, never less than the value: a stated epsilon is an upper bound."""
    return f"{math.ceil(value * 1000) / 1000:.3f}" if math.isfinite(value) else "infinity"
