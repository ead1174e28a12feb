"""An empirical audit: attacks on the trainer that makes the tables, and what they prove about epsilon.

An accountant gives an upper bound on epsilon that holds if the code does what it says. An audit gives a lower
bound, whatever the code says; a lower bound above the stated epsilon reveals a bug.
Plant canaries and train with and without them, with `two_worlds` (one canary, many short runs) or `one_run`
(one run, many canaries, each included by its own coin flip). Score how far the parameters moved along their
gradients. Bound epsilon from the scores with `two_worlds_bound` (Clopper-Pearson) or `one_run_bound`
(binomial tail).

Formal guarantee of both bounds: if the trainer is (epsilon, delta)-differentially private under adding or
removing one example, the bound exceeds epsilon with probability 1 - confidence at most, however the scores
were made. The converse does not hold: an attack that finds little or nothing shows nothing. It may be weak,
or have too few runs: a bound says how much it could have shown at `most`, and if that is below the stated
epsilon, no fault at all would be seen (`Bound.verdict`). Nor does the audit see noise that is missing in one
leaf, a clip after the sum, a batch that is always the same or a draw that is cut short, if the canary is not
affected; `dpnb.training.checks` looks for these. `reachable_values` attacks the arithmetic of the noise.
The bounds are a page of SciPy; jax-privacy 2.0 has them too, but brings pydantic, chex and a second trainer.
References: Nasr et al. 2021 (arXiv 2101.04535) for two worlds; Steinke, Nasr and Jagielski 2023, Privacy
auditing with one (1) training run (arXiv 2305.08846); Mironov 2012, On significance of the least significant
bits for differential privacy (doi 10.1145/2382196.2382264).
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from scipy import optimize, stats

from dpnb.privacy import PoissonSampler, ShuffleSampler, physical_batches
from dpnb.training import Trainer, seeds, update

CHUNK = 500  # runs that are computed side by side


@dataclasses.dataclass(frozen=True)
class Bound:
    """A lower bound `epsilon` (>= 0) at `delta`, wrong with probability 1 - confidence at most.

    found: the counts behind it.
    most: the bound if every guess had been right, which this number of runs or guesses cannot exceed.
    """

    epsilon: float
    delta: float
    confidence: float
    found: str
    most: float = math.inf

    def __str__(self) -> str:
        at = f"delta = {self.delta:g}, {100 * self.confidence:g} % confidence"
        reach = f"; {self.most:.3f} at most could be shown" if math.isfinite(self.most) else ""
        return f"epsilon >= {self.epsilon:.3f} at {at} ({self.found}{reach})"

    def verdict(self, stated: float) -> str:
        """Says what this means for a stated epsilon, or that it cannot tell."""
        if self.epsilon > stated:
            return f"broken: epsilon is above the stated {stated:.3f}, but for a chance of {1 - self.confidence:.2g}"
        if self.most <= stated:
            return (
                f"cannot tell: {self.most:.3f} at most could be shown, and {stated:.3f} is stated; more runs or "
                "guesses (`runs_needed`), or an attack on fewer updates, whose stated epsilon is smaller"
            )
        return f"no objection to the stated {stated:.3f}, where up to {self.most:.3f} could have been shown"


@dataclasses.dataclass(frozen=True)
class ExcludingSampler:
    """A sampler that never draws the examples `excluded` (positions), and draws all others as `sampler` does.

    Under Poisson sampling this is the run on the data set without them, to the bit. Under shuffling their
    places stay empty: the neighbouring relation is then to replace an example by nothing.
    """

    sampler: PoissonSampler | ShuffleSampler
    excluded: Sequence[int]

    def indices(self, step: int) -> np.ndarray:
        """The examples of update `step` without the excluded ones, int32 [size]."""
        drawn = self.sampler.indices(step)
        return drawn[~np.isin(drawn, self.excluded)]


def canary_gradient(trainer: Trainer, canary: int) -> np.ndarray:
    """Returns what an example adds to a sum at the first parameters: its clipped gradient, [parameters]."""
    key = seeds.step_key(trainer.state.key, 0)
    ((part, mask),) = physical_batches(np.array([canary]), trainer.physical_batch_size)
    totals = trainer.accumulate(*update.inputs(trainer, trainer.state, trainer.zero(), part, mask, key))
    return _flat(
        jax.tree.map(lambda partial: np.asarray(partial).sum(0) * trainer.grad.unit, totals.gradient)
    )


def parameter_deltas(trainer: Trainer, steps: int, seed: int, excluded: Sequence[int] = ()) -> np.ndarray:
    """Makes one run from the trainer's first state, by `one_update`; returns all that an attacker can see.

    Args:
      trainer: from `dpnb.training.update.make_trainer`, or one that was broken on purpose.
      steps: number of updates.
      seed: of the sampling, the augmentation and the noise.
      excluded: positions of the training examples that this run does without.
    Returns:
      float32 [steps, parameters]: parameters before minus after each update, all leaves in one row.
    """
    state = trainer.state
    trainer, key = update.reseeded(trainer, seed)
    trainer = dataclasses.replace(trainer, sampler=ExcludingSampler(trainer.sampler, excluded))
    state, seen = state._replace(key=key), [_flat(state.params)]
    for _ in range(steps):
        state, _ = update.one_update(trainer, state)
        seen.append(_flat(state.params))
    return -np.diff(seen, axis=0)


def two_worlds(
    trainer: Trainer, canary: int, runs: int, steps: int = 1, seed: int = 1, score: Callable | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks `runs` runs without one example and as many with it, each with its own seed.

    They are the runs of `parameter_deltas`, side by side: thousands a second if data and model are tiny.

    Args:
      trainer: see `parameter_deltas`; one physical batch must hold all its training examples, in memory.
      canary: position of the example. The strongest one has a large gradient, unlike all others.
      runs, steps: number of runs in each world, and of updates in each run.
      seed: the first seed; later runs have those after it.
      score: float32 [runs, steps, parameters] (see `parameter_deltas`) -> [runs], higher if the canary seems
        to be in, or [runs, ...], several scores. None scores the total movement along the canary's gradient.
    Returns:
      (without, with), float64 [runs] each (or [runs, ...]), for `two_worlds_bound`.
    Raises:
      ValueError: the examples do not fit in one physical batch in memory.
    """
    n, size = trainer.sampler.n, trainer.physical_batch_size
    if n > size or not trainer.feed.resident:
        raise ValueError(f"one physical batch in memory must hold all examples, got {n}, batches of {size}")
    direction = canary_gradient(trainer, canary)
    score = score or (lambda moved: moved.sum(1) @ direction / np.linalg.norm(direction))
    images, labels, *_ = trainer.feed.blank(size)

    def one(state, indices, mask, noise):  # what `dpnb.training.update.one_update` does
        key = seeds.step_key(state.key, state.step)
        totals = trainer.accumulate(state.params, trainer.zero(), images, labels, indices, mask, key)
        return trainer.update(state, totals, noise)[0]

    together = jax.jit(jax.vmap(one, (0, None, 0, 0)))
    indices, found = np.arange(size, dtype=np.int32) % n, []
    for start in range(0, 2 * runs, CHUNK):
        numbers = range(seed + start, seed + start + CHUNK)
        samplers = [dataclasses.replace(trainer.sampler, seed=s) for s in numbers]
        noises = [trainer.noise and dataclasses.replace(trainer.noise, seed=s) for s in numbers]
        state = jax.tree.map(lambda x: np.broadcast_to(x, (CHUNK, *x.shape)), trainer.state)
        state = state._replace(key=np.stack([seeds.root_key(s) for s in numbers]))
        seen = [_flat(state.params, CHUNK)]
        for step in range(steps):
            masks = np.zeros((CHUNK, size), bool)
            for mask, sampler in zip(masks, samplers, strict=True):
                mask[sampler.indices(step)] = True
            masks[::2, canary] = False  # the worlds take turns
            drawn = [noise and noise(step) for noise in noises]
            state = together(state, indices, masks, jax.tree.map(lambda *leaves: np.stack(leaves), *drawn))
            seen.append(_flat(state.params, CHUNK))
        found.append(score(-np.diff(np.stack(seen, 1), axis=1)))
    scores = np.concatenate(found, dtype=float)[: 2 * runs]
    return scores[::2], scores[1::2]


def two_worlds_bound(without, with_, *, delta: float, confidence: float = 0.99) -> Bound:
    """Bounds epsilon from below by the scores of independent runs in two neighbouring worlds.

    Under (epsilon, delta)-privacy, true positive rate <= e^epsilon * false positive rate + delta, for every
    guessing rule and whichever world is the positive one. The first half of the runs chooses both. The
    second half is counted, and log((true - delta) / false) is taken at the Clopper-Pearson bounds of the two
    rates, each of confidence (1 + confidence) / 2.

    Args:
      without, with_: float, in the order of the runs, at least 4 of each.
      delta: in [0, 1), at which epsilon is bounded.
      confidence: in (0, 1).
    Raises:
      ValueError: NaN among the scores, too few of them, or an argument out of its range.
    """
    without, with_ = _checked(without, delta, confidence), _checked(with_, delta, confidence)
    if min(len(without), len(with_)) < 4:
        raise ValueError(f"each world needs at least 4 runs, got {len(without)} and {len(with_)}")
    tried = []
    for guess, worlds in (("with", (without, with_)), ("without", (-with_, -without))):  # where high
        first, second = [s[: len(s) // 2] for s in worlds], [s[len(s) // 2 :] for s in worlds]
        thresholds = np.unique(np.concatenate(first))
        values, *_ = _rates(*first, thresholds, delta, confidence)
        tried.append((values.max(), guess, second, thresholds[[values.argmax()]]))
    _, guess, (low, high), threshold = max(tried, key=lambda t: t[0])
    most = min(_perfect(len(s), delta, confidence) for s in (low, high))
    (value,), (false,), (true,) = _rates(low, high, threshold, delta, confidence)
    found = f'"{guess}" guessed rightly {true} of {len(high)} times, wrongly {false} of {len(low)}'
    return Bound(max(0.0, float(value)), delta, confidence, found, most)


def reach(runs: int, delta: float, confidence: float = 0.99) -> float:
    """Returns the largest epsilon that `two_worlds_bound` can show with `runs` in each world, all told apart.

    >>> round(reach(3000, 1e-2), 2)
    5.63
    """
    return _perfect(runs - runs // 2, delta, confidence)


def runs_needed(epsilon: float, delta: float, confidence: float = 0.99) -> int:
    """Returns the runs in each world that `two_worlds_bound` needs to exceed epsilon with a perfect attack.

    >>> runs_needed(3.0, 1e-5)
    219
    """
    few, most = 1, 4
    while reach(most, delta, confidence) <= epsilon:
        few, most = most, 2 * most
    return few + bisect.bisect_right(range(few, most), epsilon, key=lambda n: reach(n, delta, confidence))


def _perfect(runs: int, delta: float, confidence: float) -> float:
    """Returns the bound if `runs` are counted in each world, and all guesses are right."""
    (value,), *_ = _rates(np.zeros(runs), np.ones(runs), np.ones(1), delta, confidence)
    return max(0.0, float(value))


def _rates(low, high, thresholds, delta, confidence):
    """Returns (bounds of epsilon, false positives, true positives) of guessing "high" from each threshold."""
    miss = (1 - confidence) / 2
    false, true = (len(s) - np.searchsorted(np.sort(s), thresholds) for s in (low, high))
    with np.errstate(invalid="ignore", divide="ignore"):
        upper = np.where(false < len(low), stats.beta.ppf(1 - miss, false + 1, len(low) - false), 1.0)
        lower = np.where(true > 0, stats.beta.ppf(miss, true, len(high) - true + 1), 0.0)
        return np.where(lower > delta, np.log((lower - delta) / upper), -np.inf), false, true


def reachable_values(
    noise: Callable[[np.ndarray, int], np.ndarray],
    shift: np.ndarray,
    runs: int,
    learned: int = 2**22,
    seed: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks the arithmetic of any noise: which values can it reach from one total, but not from the other?

    A generator of floats has finitely many values, few of them in the tails, and a float sum keeps the low
    bits of what is added. In the tails these tell the totals apart, whatever the scale of the noise (Mironov
    2012). Nothing need be known about the noise. Its values are learned from draws with other seeds, and
    those of the outermost 1 % that were seen in one world only are then looked for in the runs.

    Args:
      noise: (total, seed) -> what is released, [n] each: a noisy sum, or parameters after an update; it
        treats all coordinates alike.
      shift: float32 [n], what one example adds, the same in each coordinate: sensitivity / sqrt(n).
      runs: number of runs in each world.
      learned: how many numbers to draw in each world before. A quarter of the generator's own values is
        enough (float32 from JAX has 2^23); generators of many more are beyond this attack.
      seed: the first seed of the runs; the draws before use later ones.
    Returns:
      (without, with), float64 [runs] each, for `two_worlds_bound`.
    """
    worlds, later = (np.zeros_like(shift), shift), seed + 2 * runs
    middle, far = 0.0, None
    known = []
    for world, total in enumerate(worlds):
        values = []
        for i in range(-(-learned // len(shift))):
            y = np.asarray(noise(total, later + 2 * i + world))
            if far is None:
                middle = np.median(y)
                far = np.quantile(abs(y - middle), 0.99)
            values.append(y[abs(y - middle) > far])
        known.append(np.unique(np.concatenate(values)))
    only = np.setdiff1d(*known), np.setdiff1d(*known[::-1])

    def score(y):
        y = np.unique(y)
        return float(np.isin(y, only[1]).sum() - np.isin(y, only[0]).sum())

    scores = [
        [score(np.asarray(noise(t, seed + 2 * i + w))) for i in range(runs)] for w, t in enumerate(worlds)
    ]
    return np.array(scores[0]), np.array(scores[1])


def one_run(trainer: Trainer, canaries, steps: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Trains once, with each canary in or out by its own fair coin flip, and scores all of them.

    Args:
      trainer, steps, seed: as for `parameter_deltas`.
      canaries: int [m], positions in the training set; strong ones have large, mutually orthogonal gradients.
    Returns:
      (included bool [m], scores float64 [m]), for `one_run_bound`; scores are movements along the gradients.
    """
    canaries = np.asarray(canaries)
    included = np.random.default_rng([seed, 0x636F696E]).random(len(canaries)) < 0.5
    moved = parameter_deltas(trainer, steps, seed, canaries[~included]).sum(0, dtype=float)
    directions = (canary_gradient(trainer, int(canary)) for canary in canaries)
    return included, np.array([moved @ d / np.linalg.norm(d) for d in directions])


def one_run_bound(included, scores, *, high: int, low: int = 0, delta, confidence: float = 0.99) -> Bound:
    """Bounds epsilon from below by one run with m canaries, each of them in by its own fair coin flip.

    It guesses "in" for the `high` canaries of the highest scores, "out" for the `low` ones of the lowest, and
    abstains from the rest. The bound is the epsilon at which the number of right guesses has `p_value`
    1 - confidence.

    Args:
      included: bool [m].
      scores: float [m], made without looking at `included`.
      high, low: numbers of guesses, 1 to m in all, chosen before the run: the best of several choices is
        not a bound at this confidence.
      delta: in [0, 1 / (2 m)); for larger values the correction uses up everything.
      confidence: in (0, 1).
    Raises:
      ValueError: shapes differ, NaN is among the scores, or an argument is out of its range.
    """
    included, scores = np.asarray(included, bool), _checked(scores, delta, confidence)
    m, guesses = len(scores), high + low
    if included.shape != scores.shape or min(high, low) < 0 or not 1 <= guesses <= m:
        got = f"{included.shape}, {scores.shape} and {high} + {low} guesses"
        raise ValueError(f"included and scores must be [m], with 1 to m guesses in all, got {got}")
    if 2 * m * delta >= 1:
        raise ValueError(f"delta must be below 1 / (2 * {m} canaries), got {delta}; make one of them smaller")
    coins = included[np.argsort(scores, kind="stable")]
    right = int(coins[m - high :].sum() + (~coins[:low]).sum())

    made = guesses, m, delta, confidence
    found = f"{right} of {guesses} guesses right, {m} canaries"
    return Bound(_proven_by(right, *made), delta, confidence, found, _proven_by(guesses, *made))


@functools.lru_cache(maxsize=4096)
def _proven_by(right: int, guesses: int, canaries: int, delta: float, confidence: float) -> float:
    """The epsilon at which `p_value` is 1 - confidence, 0 if it is larger even there; few counts ask for many bounds."""
    above = lambda epsilon: p_value(right, guesses, canaries, epsilon, delta) - (1 - confidence)
    return 0.0 if above(0.0) >= 0 else float(optimize.brentq(above, 0.0, 100.0))


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Bounds the probability that `right` or more of `guesses` are right under (epsilon, delta)-privacy.

    The main theorem of Steinke, Nasr and Jagielski 2023 (section 5): with m canaries and
    f(v) = P[Binomial(guesses, p) >= v], p = e^epsilon / (1 + e^epsilon), it is

        f(right) + 2 m delta max over i >= 1 of (f(right - i) - f(right)) / i.

    Proof idea: let delta = 0, fix the output and hence the guesses, and reveal the coins one after another.
    Each was fair, and the output is at most e^epsilon times likelier for one side than for the other, so by
    Bayes a guess is right with probability p at most, whatever the coins before it: at most a binomial. With
    delta some outputs give guesses away; their number F has mean 2 m delta at most, and
    P[Binomial + F >= right] is largest if F is 0 or the one i that gains most for its mean.

    The bound grows with epsilon if 2 m delta < 1.

    >>> p_value(20, 20, 1000, 0.0, 0.0) == 0.5**20
    True
    """
    p = 1 / (1 + np.exp(-epsilon))
    free = np.arange(right + 1)
    tail = stats.binom.sf(right - 1 - free, guesses, p)
    gain = (tail - tail[0])[1:] / free[1:]
    return float(min(1.0, tail[0] + 2 * canaries * delta * gain.max(initial=0.0)))


def _checked(scores, delta, confidence) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim != 1 or np.isnan(scores).any() or not 0 <= delta < 1 or not 0 < confidence < 1:
        got = f"shape {scores.shape}, {np.isnan(scores).sum()} NaN, delta {delta}, confidence {confidence}"
        raise ValueError(f"scores must be [n] without NaN, delta in [0, 1), confidence in (0, 1), got {got}")
    return scores


def _flat(tree, *leading) -> np.ndarray:
    return np.concatenate([np.reshape(leaf, (*leading, -1)) for leaf in jax.tree.leaves(tree)], axis=-1)
