"""The exercises of the lectures: what makes an answer right, and what to think of next. Solutions are in the lectures.

It is here, and not in the lectures, so that nobody reads an answer by accident. Most checks compute what is right anew.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from dpnb import privacy


class Exercise(NamedTuple):
    """An exercise.

    right: says of an answer, and of what the lecture gives beside it, whether it is right; or returns a hint of its own.
    hint: for an answer that is not.
    """

    right: Callable[..., bool | str]
    hint: str


class NoAnswer(Exception):
    """The answer, or what it returns, is still the ellipsis that stands in its place."""


EXERCISES: dict[str, Exercise] = {}


def check(number: str, answer: Any, **given: Any) -> None:
    """Prints "right", "no answer yet", or "not yet" with a hint; whatever the answer is or does, it raises nothing.

    Args:
      number: of the lecture and the exercise, "01.4".
      answer: a value or a function; `...`, or a function that returns it, is no answer yet.
      given: what the lecture has computed and the exercise is about.
    Raises:
      KeyError: there is no such exercise.
    """
    right, hint = EXERCISES[number]

    def asked(*arguments):
        value = answer(*arguments)
        if value is ...:
            raise NoAnswer
        return value

    try:
        if answer is ...:
            raise NoAnswer
        said = right(asked if callable(answer) else answer, **given)
    except NoAnswer:
        print("no answer yet")
        return
    except Exception as error:
        said, hint = False, f"{hint} (your answer raised {error!r})"
    if isinstance(said, str):
        said, hint = False, said
    print("right" if said else f"not yet. Hint: {hint}")


def _exercise(number: str, hint: str) -> Callable:
    """Registers what makes the answer to an exercise right."""

    def register(right):
        EXERCISES[number] = Exercise(right, hint)
        return right

    return register


@_exercise(
    "01.1", "one norm for each row (axis=1, keepdims=True); multiply by min(1, C / norm); zero stays zero, without dividing by it"
)  # fmt: skip
def _clip(clip):
    g = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [-6.0, 8.0]])
    norms = [5.0, 0.5, 1.0, 10.0]
    return all(
        np.allclose(clip(g.copy(), c), [row * min(1, c / norm) for row, norm in zip(g, norms, strict=True)])
        for c in (0.5, 2.0)
    )


@_exercise(
    "01.2", "right if noise of std sigma C stays below C / 2; so Phi of what? It must be near 1 for little noise and 1/2 for much"
)  # fmt: skip
def _attacker(attacker_is_right):
    return all(abs(attacker_is_right(s) - stats.norm.cdf(0.5 / s)) < 1e-4 for s in (0.5, 1.0, 3.0))


BROKEN = {
    "a": "a: subtract two updates, as the thief did",
    "b": "b: what is computed from private results alone is private too",
    "c": "c: a vector of norm C can point anywhere; how far apart can two such sums be, with and without you?",
    "d": "d: are the test images in the data that the promise is about?",
    "e": "e: on which data does it depend, and where is its noise?",
    "f": "f: is that number the same with you and without?",
}


@_exercise("01.3", "letters from a to f")
def _broken(letters):
    given = letters if isinstance(letters, (set, frozenset, list, tuple, str)) else ()
    given = {letter.lower() for word in given for letter in str(word) if letter not in ", "}
    wrong = sorted(given ^ set("acef"))
    return "; ".join(dict.fromkeys(BROKEN.get(letter, "letters from a to f") for letter in wrong)) or True


@_exercise(
    "01.4", "privacy.calibrate_noise takes the budget, the sampling probability and the number of updates"
)
def _sigma_for_one(sigma, q, steps, delta):
    spent = privacy.epsilon(privacy.Mechanism(sigma, q), steps, delta)
    if 0.5 < spent <= 0.98:
        return f"that costs {spent:.3f} by PLD, so less noise would do"
    return 0.98 < spent <= 1


@_exercise("02.1", "caught is one minus missed, and f_gauss(0.05, 1.0) is missed; in percent")
def _caught(percent):
    return abs(percent - 100 * (1 - stats.norm.cdf(stats.norm.ppf(0.95) - 1))) < 0.1


@_exercise("02.2", "the line: misses are at least 1 - delta - e^epsilon alpha; the other line is lower here")
def _caught_at_one(percent):
    return abs(percent - 100 * (math.e * 0.05 + 1e-5)) < 0.05


@_exercise("02.3", "T releases are one with sigma / sqrt(T)")
def _releases(releases):
    return math.isclose(10 / math.sqrt(releases), 1)


@_exercise(
    "02.4",
    'privacy.calibrate_steps(privacy.PrivacyBudget(2.0, 1e-5), q, 6.0, "pld"), and once more with "rdp"',
)
def _updates_that_fit(pair, q):
    budget = privacy.PrivacyBudget(2.0, 1e-5)
    pld, rdp = (privacy.calibrate_steps(budget, q, 6.0, kind) for kind in ("pld", "rdp"))
    return tuple(pair) == (pld, pld - rdp)


@_exercise("03.1", "above 1 the nine are untouched: the sum of all ten is C - 9; when is it positive?")
def _smallest_clip_norm(c):
    sums = [np.clip([-1.0] * 9 + [20.0], -x, x).sum() for x in (0.999 * c, c, 1.001 * c)]
    return sums[0] < -1e-6 < abs(sums[1]) < 1e-6 < sums[2]


@_exercise(
    "03.2", "sigma times the sensitivity of the sum; the sensitivity does not depend on B, and only for one of the two on K"
)  # fmt: skip
def _noise_inside_and_outside(pair):
    sensitivities = np.array([1, 16])
    return np.shape(pair) == (2,) and np.allclose(pair, 10 * sensitivities)


@_exercise(
    "03.3", "e stays, k, y and z are summed over, i and o become rows and columns: look at weight_gradient"
)
def _einsum(formula):
    random = np.random.default_rng(0)
    x, g = random.normal(size=(3, 2, 4, 5, 6)), random.normal(size=(3, 2, 4, 5, 7))
    wanted = np.stack([np.tensordot(a, b, ([0, 1, 2], [0, 1, 2])) for a, b in zip(x, g, strict=True)])
    made = np.einsum(formula, x, g)
    return made.shape == wanted.shape and np.allclose(made, wanted)


@_exercise("04.1", "the noise stays as it is; how far does the sum move when all three copies leave?")
def _sigma_of_three_copies(sigma):
    return math.isclose(3 * sigma, 1, rel_tol=0.02)


@_exercise(
    "04.2", "each example should come out with mean 0 and standard deviation 1, whoever else is there; which axis of x are the examples?"
)  # fmt: skip
def _norm(norm):
    import jax.numpy as jnp

    random = np.random.default_rng(1)
    scales = np.geomspace(1, 20, 8)[:, None]
    crowd = (3 * scales * random.normal(size=(8, 192)) + scales).astype(np.float32)
    rows = np.asarray(norm(jnp.asarray(crowd)))
    alone = all(
        np.abs(np.delete(rows, i, 0) - np.asarray(norm(jnp.asarray(np.delete(crowd, i, 0))))).max() < 1e-4
        for i in range(len(crowd))
    )
    return alone and np.abs(rows.mean(1)).max() < 0.05 and np.abs(rows.std(1) - 1).max() < 0.2


@_exercise(
    "04.3",
    "all k runs looked at the data, and any of them may be published: compose all of them, by PLD. "
    "Epsilons do not simply add up (lecture 02): `privacy.epsilon(mechanism, steps, DELTA)`",
)
def _public_choice(function, mechanism, delta):
    return all(
        math.isclose(function(k), privacy.epsilon(mechanism, k, delta), rel_tol=1e-3) for k in (1, 2, 4)
    )


@_exercise("04.4", "the average of r has noise sigma / sqrt(r)")
def _repetitions(r):
    return math.isclose(4 / math.sqrt(r), 1)


@_exercise(
    "05.1",
    "each of the two rates may miss with probability 0.5 %: beta.ppf(0.005, k, n - k + 1) from below, "
    "beta.ppf(0.995, k + 1, n - k) from above",
)
def _clopper_pearson(epsilon):
    from dpnb import audit

    runs = np.arange(500)
    without, with_ = (
        np.tile(runs < k, 2).astype(float) for k in (60, 420)
    )  # scores: 1 in k runs of each half
    return math.isclose(epsilon, audit.two_worlds_bound(without, with_, delta=0.01).epsilon, rel_tol=1e-3)


@_exercise(
    "05.2", "r right guesses in a row have probability p ** r, which must fall to 1 %; no more than needed"
)
def _guesses_needed(r):
    from dpnb import audit

    return audit.p_value(r, r, r, 3, 0) <= 0.01 < audit.p_value(r - 1, r - 1, r - 1, 3, 0)


@_exercise(
    "05.3", "50 chances of failing must add up to 1 %, no less; and a confidence is a number like 0.99"
)
def _confidence_of_each(confidence):
    return math.isclose(50 * (1 - confidence), 0.01, rel_tol=1e-3)


@_exercise("06.1", "three standard errors, at least two runs of each, and the right sign")
def _rows_that_help(number, rows):
    helps = rows["points"] > 3 * rows["standard error"]
    enough = rows[["n with", "n without"]].min(axis=1) > 1
    return not isinstance(number, bool) and number == (helps & enough).sum()


@_exercise("06.2", "solve 1.5 = 3 sqrt(2 s^2 / n) for n, and round up")
def _runs_needed(n):
    errors = [3 * math.sqrt(2 * 0.85**2 / runs) for runs in (n, n - 1)]
    return n == int(n) and errors[0] <= 1.5 < errors[1]


@_exercise(
    "06.3", "`privacy.calibrate_noise` gives sigma; it is less than 10 by so many percent (epsilon does not shrink in proportion)"
)  # fmt: skip
def _less_noise(percent):
    sigma = privacy.calibrate_noise(privacy.PrivacyBudget(1.0, 1e-5), 4096 / 50_000, 875, "pld")
    return abs(percent - 100 * (1 - sigma / 10)) < 0.1
