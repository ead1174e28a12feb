"""Checks a trainer before anything is spent: its noise is complete, every example clipped, the draw fair.

The accountant takes all three for granted. The audit (`dpnb.audit`) attacks the whole, and cannot see noise
that is missing in one leaf, a clip after the sum, a batch that is always the same, or a draw that is cut
short. So the parts are examined here one by one, for any model and optimizer. Up to the optimizer all
arithmetic is in integers, so independence of an update from something can be tested to the bit.

No training image is read: gradients are those of made-up images. Noise and batches that are drawn are thrown
away. Nothing is released, nothing is charged, and a report says nothing about the data.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dpnb.training import seeds, update
from dpnb.training.sharding import batch_sharding, fetch_replicated, put, replicated
from dpnb.training.state import Accumulator, BatchMetrics, State
from dpnb.training.update import Trainer

ALARM = 1e-9  # the largest probability with which a sound trainer fails `check_trainer`
OWN_SEED = 0x636865636B  # for made-up images, and for the check's own draws
NUMBERS = 200_000  # numbers of noise to draw, in at most 64 draws
FIRST = 1000  # numbers of a leaf that are compared with those of all others
DRAWS = 10_000_000  # single examples to draw, in at least 20 and at most 1,000 batches
LARGE = 2**31  # bytes of training images beyond which no copy of the same shape is made up
ROUNDING = 1 / 64  # of the clip norm: a larger difference between two places in a batch is no rounding
STEEP = 30  # parameters are multiplied by it, to get gradients beyond the clip norm

Finding = tuple[bool | None, str]  # passed (True), failed (False) or could not be checked (None); in words


class UnsoundTrainer(ValueError):
    """A trainer does something else than what its epsilon is computed for."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `check_trainer`.

    ok: nothing failed.
    lines: one for each check, which passed, failed, or could not be made.
    rounding: by how many clip norms what a made-up example adds depends on its place; 0 if the program rounds
      alike everywhere. The noise is accounted for as if it did.
    """

    ok: bool
    lines: tuple[str, ...]
    rounding: float = 0.0

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def raise_if_failed(self) -> None:
        """Raises an error if a check failed.

        Raises:
          UnsoundTrainer: with all lines.
        """
        if not self.ok:
            raise UnsoundTrainer(f"the trainer must do what its epsilon is computed for, but\n{self}")


def check_trainer(trainer: Trainer) -> Report:
    """Looks for faults that break the privacy claim, in about a dozen physical batches and ten updates.

    The update (exact): it depends on nothing but the sum of clipped gradients plus the noise, in every leaf
    of parameters, averages and optimizer, and not on the size or the losses of its batch. So an update of an
    empty batch contains all the noise that was drawn, once, whatever the optimizer and the number of devices.
    This is checked at the first parameters and after one update.
    The noise (statistical): over up to 64 steps and two seeds, each leaf and all together have the right
    mean, scale (neither less nor more than sigma clip norms) and distribution; no noise repeats that of
    another step, leaf or seed.
    The clip (exact): one made-up example changes the sum by what it adds alone, at most the clip norm,
    whatever else is in the batch or was summed before, and whatever its place; neither padding nor NaN
    gradients add anything. This is checked at the first parameters and at steeper ones.
    The sampler (statistical): with its own and another seed, it checks the sizes of batches, how often each
    example is drawn, how many examples two successive batches share, and how many batches two neighbouring
    examples share; and that physical batches hold what was drawn (except for photographs, which would have to
    be read). A shuffling sampler, whose epsilon is nominal, must draw batches of one size without repeats in
    them.

    If a program does not repeat itself to the bit (as some on accelerators), "exact" means up to rounding. If it rounds
    by an example's place in the batch (as on some CPUs), the clip is checked up to 1/64 of the clip norm, and
    `Report.rounding` says what was seen.

    False alarms: a sound trainer fails with probability 10^-9 at most, which the statistical tests share
    (Bonferroni); they use exact distributions or bounds (binomial tails, chi-square,
    Dvoretzky-Kiefer-Wolfowitz, Chernoff). The converse is not promised: a fault that is small, or that
    concerns only some steps or images, may pass. The check detects a scale of the noise that is off by some
    percent, a sampling probability off by 5 %, a draw that is cut short in one batch of forty (10,000
    examples) or of eight (50,000), and noise that is zero or repeated in a leaf of a few numbers.

    Args:
      trainer: from `dpnb.training.update.make_trainer`, or changed. Every process has to call it.
    """
    found, rounding = [*_sampler(trainer)], []
    if trainer.experiment.noise_multiplier:
        found += [*_noise_and_clip(trainer, rounding)]
    else:
        found.append((None, "noise and clip: without noise nothing is private, and nothing is claimed"))
    said = {True: "ok", False: "FAILED", None: "not checked"}
    lines = tuple(f"{said[ok]}: {text}" for ok, text in found)
    return Report(all(ok is not False for ok, _ in found), lines, max(rounding, default=0.0))


def _noise_and_clip(trainer: Trainer, rounding: list[float]) -> Iterator[Finding]:
    """Checks both; what rounding by place does goes to `rounding`."""
    bits, sigma = trainer.grad.grid_bits, trainer.experiment.noise_multiplier
    if trainer.noise is None or bits is None:
        what = "no noise is drawn" if trainer.noise is None else "gradients are not rounded to a grid"
        yield False, f"noise: noise_multiplier is {sigma}, but {what}; make the trainer with make_trainer"
        return
    sizes = [p.size for p in jax.tree.leaves(trainer.state.params)]
    steps = min(64, max(2, NUMBERS // max(1, sum(sizes))))
    other, _ = update.reseeded(trainer, OWN_SEED)
    drawn = [trainer.noise(step) for step in range(steps)]
    got, want = (
        jax.tree.map(_kind, drawn[0]),
        jax.tree.map(lambda p: (np.dtype("int32"), p.shape), trainer.state.params),
    )
    if got != want:
        yield False, f"noise: it must be int32 in the shapes of the parameters, {want}, got {got}"
        return
    yield from _drawn([*drawn, other.noise(0)], sigma * 2.0**bits)
    yield from _update(trainer, drawn[:2])
    yield from _clip(trainer, 2.0**bits, rounding)


def _kind(x) -> tuple:
    return np.asarray(x).dtype, np.shape(x)


# The noise that is drawn.


def _drawn(draws: list, std: float) -> Iterator[Finding]:
    """Checks noise of several steps and, last, another seed, a pytree each; std: the least it must have."""
    from scipy import stats  # half a second, which what trains nothing need not wait for

    names = [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(draws[0]) if x.size]
    leaves = [[np.ravel(x) for x in jax.tree.leaves(draw) if x.size] for draw in draws]  # [draws][leaves]
    most = math.hypot(std + 8, 12**-0.5)  # GridNoise rounds up to a multiple of 8, and then to integers
    alarm = ALARM / 16 / (len(names) + 1)
    numbers = np.array([len(draws) * x.size for x in leaves[0]])
    sums = np.array(
        [[sum(f(d[i].astype(float)) for d in leaves) for f in (np.sum, _square)] for i in range(len(names))]
    )
    wrong = []
    for name, n, (total, squares) in zip(
        [*names, "all"], [*numbers, numbers.sum()], [*sums, sums.sum(0)], strict=True
    ):
        if stats.chi2.cdf(squares / std**2, n) < alarm or stats.chi2.sf(squares / most**2, n) < alarm:
            wrong.append(f"{name} has {math.sqrt(squares / n) / std:.2g} times the standard deviation")
        elif abs(total) > stats.norm.isf(alarm / 2) * most * math.sqrt(n):
            wrong.append(f"{name} has mean {total / n / std:.2g} standard deviations")
    some = np.concatenate([x[:FIRST] for draw in leaves for x in draw])
    value, often = np.unique(some, return_counts=True)
    off = np.abs(often.cumsum() / len(some) - stats.norm.cdf((value + 0.5) / std)).max()
    if not wrong and off > math.sqrt(math.log(16 / ALARM) / 2 / len(some)) + math.log(most / std) / 4:
        wrong.append(f"its distribution is {off:.2g} off the Gaussian one")
    yield (
        not wrong,
        f"noise: {', '.join(wrong)}; draw all of it, for the sum (see dpnb.privacy.noise.GridNoise)"
        if wrong
        else f"noise: Gaussian of the right scale in every leaf ({numbers.sum():,} numbers)",
    )
    of = [f"{name} at {_draw(i, len(draws))}" for i in range(len(draws)) for name in names]
    same = _repeated([x for draw in leaves for x in draw], std, most)
    yield (
        not same,
        f"noise: {of[same[0]]} and {of[same[1]]} are not independent; draw it afresh for every step, leaf and seed"
        if same
        else "noise: that of every step, leaf and seed is its own",
    )


def _draw(i: int, draws: int) -> str:
    return f"step {i}" if i < draws - 1 else "step 0 of another seed"


def _square(x) -> float:
    return float(np.dot(x, x))


def _repeated(parts: list[np.ndarray], std: float, most: float) -> tuple[int, int] | None:
    """Finds two parts that are equal or whose first numbers are correlated; None if all are independent."""
    known = {}
    for i, x in enumerate(parts):
        # Two independent parts of that size are equal with probability 2^-64 at most.
        if x.size * math.log2(2 * std) > 64 and known.setdefault((x.shape, x.tobytes()), i) != i:
            return known[x.shape, x.tobytes()], i
    table = np.zeros((len(parts), FIRST))
    for row, x in zip(table, parts, strict=True):
        row[: x.size] = x[:FIRST] / most
    n = np.minimum.outer(*[[min(x.size, FIRST) for x in parts]] * 2)
    # Chernoff: a sum of n products of independent standard normals is beyond sqrt(2 n a) + a with probability e^-a.
    a = math.log(16 * len(parts) ** 2 / ALARM)
    far = np.triu(np.abs(table @ table.T) > np.sqrt(2 * n * a) + a, 1)
    return tuple(map(int, np.argwhere(far)[0])) if far.any() else None


# The update.


def _update(trainer: Trainer, noises: list) -> Iterator[Finding]:
    """Checks at the first two states that the result depends on sum plus noise only, however divided up."""
    rng, state, hold = np.random.default_rng(OWN_SEED), trainer.state, _hold(trainer)
    still, how = None, "exact"
    for noise in noises:
        zero = jax.tree.map(np.zeros_like, noise)
        some = jax.tree.map(lambda x: _any_integers(rng, x.shape), noise)
        rest = jax.tree.map(np.subtract, noise, some)  # modulo 2^32

        def made(total, noise, seen=0.0, state=state):
            new, _ = trainer.update(state, hold(total, seen), jax.tree.map(put, noise, trainer.places.params))
            return new, _on_host(new)

        state, want = made(zero, noise)
        quiet = made(zero, zero)[1]
        divided = [made(total, added)[1] for total, added in ((noise, zero), (rest, some))]
        looked, moved = made(zero, noise, 7.0)[1], None
        if _differing([*divided, looked], want) and _differing([made(zero, noise)[1]], want):
            how, moved = "to rounding, as this program does not repeat itself to the bit", quiet
        if names := _differing(divided, want, moved):
            yield (
                False,
                f"update: {names} must be a function of the sum plus the noise; add all of the noise to the int32 "
                "sum, once, before anything else",
            )
            return
        if names := _differing([looked], want, moved):
            yield (
                False,
                f"update: {names} depend on the batch's own size or losses, which no noise covers; divide by "
                "expected_batch_size, and do not use `BatchMetrics`",
            )
            return
        same = {n for n in want if n.startswith(".params") and np.array_equal(want[n], quiet[n])}
        still = same if still is None else same & still
    yield True, f"update: of an empty batch, all the noise and nothing else in every leaf ({how})"
    if still:
        yield None, f"update: neither sum nor noise moved {', '.join(sorted(still))} at the first two steps"


def _differing(others: list[dict], want: dict, quiet: dict | None = None) -> str:
    """Names leaves that are not as wanted: to the bit, or (`quiet`) to 1/10,000 of how noise moved them."""

    def differs(a, b, unmoved):
        if quiet is None:
            return a.tobytes() != b.tobytes()
        a, b, unmoved = (x.astype(float) for x in (a, b, unmoved))
        return not np.abs(a - b).max(initial=0) <= 1e-4 * np.abs(b - unmoved).max(initial=0)

    return ", ".join(n for n, b in want.items() if any(differs(a[n], b, (quiet or want)[n]) for a in others))


def _any_integers(rng, shape) -> np.ndarray:
    return rng.integers(-(2**31), 2**31, shape, np.int32)


def _hold(trainer: Trainer):
    """Returns a function (int32 sums, number) -> `Accumulator`: sums on the last device, equal metrics."""
    devices = trainer.mesh.devices.size

    def totals(sums, seen):
        gradient = jax.tree.map(lambda s: jnp.zeros((devices, *s.shape), s.dtype).at[-1].set(s), sums)
        return Accumulator(
            gradient, BatchMetrics(*[jnp.full(devices, seen, jnp.float32)] * len(BatchMetrics._fields))
        )

    hold = jax.jit(totals, out_shardings=batch_sharding(trainer.mesh))
    return lambda sums, seen=0.0: hold(jax.tree.map(put, sums, trainer.places.params), np.float32(seen))


def _on_host(state: State) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(state._replace(key=()))
    return {jax.tree_util.keystr(path): np.asarray(fetch_replicated(leaf)) for path, leaf in leaves}


# The clip.


def _clip(trainer: Trainer, norm: float, rounding: list[float]) -> Iterator[Finding]:
    """Checks what single examples add to the sum, in units of the grid; norm: the clip norm in them."""
    size, rng = trainer.physical_batch_size, np.random.default_rng(OWN_SEED)
    batch, count = _made_up(trainer, rng)
    key = seeds.step_key(put(seeds.root_key(OWN_SEED), replicated(trainer.mesh)), 0)
    hold, places = _hold(trainer), np.arange(size)
    start = jax.tree.map(lambda p: _any_integers(rng, p.shape), trainer.state.params)
    nothing = jax.tree.map(np.zeros_like, start)
    collect = jax.jit(
        lambda totals: jax.tree.map(lambda t: t.sum(0, t.dtype), totals),
        out_shardings=replicated(trainer.mesh),
    )
    steeper = jax.jit(lambda p: jax.tree.map(lambda x: STEEP * x, p), out_shardings=trainer.places.params)

    def summed(params, who, before, moved=0):
        """Sums the examples `who`, bool [size], in their own or `moved` places; all others are padding."""
        order, who = (np.roll(x, moved) for x in (np.where(who, places % count, 0).astype(np.int32), who))
        totals = collect(trainer.accumulate(params, hold(before), *batch(order, who), key))
        return jax.tree.map(lambda t: np.asarray(fetch_replicated(t)), totals)

    def change(totals, before=start):
        parts = jax.tree.map(np.subtract, totals.gradient, before)  # modulo 2^32
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(parts)])

    params, everyone = trainer.state.params, np.ones(size, bool)
    first, steep = summed(params, everyone, start), steeper(params)
    if (kinds := jax.tree.map(_kind, first.gradient)) != jax.tree.map(_kind, start):
        yield (
            False,
            f"clip: sums must be int32 in the shapes of the parameters, got {kinds}; see clipped_grad",
        )
        return
    padding = _length(change(summed(params, ~everyone, start)))
    longest, apart, clipped = 0.0, 0.0, 0.0
    for at, full in ((params, first), (steep, summed(steep, everyone, start))):
        clipped += float(full.seen.clipped)
        for j in {min(1, size - 1), size - 1}:
            alone = change(summed(at, places == j, nothing), nothing)
            moved = change(full) - change(summed(at, places != j, start))
            longest = max(longest, _length(alone), _length(moved))
            apart = max(apart, _length(alone - moved))
    elsewhere = change(summed(params, everyone, start, moved=1)) - change(first)
    apart = max(apart, _length(elsewhere))
    never = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    unreal = _length(change(summed(never, everyone, start)))  # gradients that are no numbers
    repeats = not padding and not unreal
    repeats = repeats or np.array_equal(change(first), change(summed(params, everyone, start)))
    nothing_is = 0 if repeats else norm * ROUNDING
    remedy = "clip the gradient of every example on its own, before it is added to the sum"
    if longest > norm:
        yield False, f"clip: one made-up example moves the sum by {longest / norm:.4g} clip norms; {remedy}"
    elif padding > nothing_is:
        yield False, f"clip: padding must add nothing, but adds {padding / norm:.2g} clip norms; {remedy}"
    elif unreal > nothing_is:
        yield (
            False,
            "clip: gradients that are not a number must add nothing; XLA was told that there are none, leave fast_math "
            "out of XLA_FLAGS",
        )
    elif apart > norm * ROUNDING:
        what = f"adds, with others or without, differs by {apart / norm:.2g} clip norms"
        yield False, f"clip: what a made-up example {what}; {remedy}"
    else:
        rounding.append(apart / norm)
        how = f"to {apart / norm:.1g} of it, which is rounding" if apart else "exact"
        if not repeats:
            how = "to 1/64 of it, as this program does not repeat itself to the bit"
        yield True, f"clip: an example adds its own clipped gradient, whatever else is in the sum ({how})"
        if not clipped:
            yield None, "clip: no made-up example has a gradient beyond the clip norm"


def _length(x: np.ndarray) -> float:
    """Returns the norm of integers, exact up to 2^26."""
    return math.sqrt(_square(x.astype(float)))


def _made_up(trainer: Trainer, rng):
    """Returns a function (int32 [size] of made-up examples, mask) -> batch for `accumulate`, and how many.

    They are black, white, both at random, and noise, in turn, with the first two labels.
    """
    size, place = trainer.physical_batch_size, batch_sharding(trainer.mesh)
    images, labels, *_ = trainer.feed.blank(size)
    count = min(size, len(images))
    if images.dtype == np.uint8:
        made = rng.integers(0, 256, (count, *images.shape[1:]), np.uint8)
        made[::4], made[1::4], made[2::4] = 0, 255, 255 * (made[2::4] > 127)
    else:
        made = rng.normal(size=(count, *images.shape[1:])).astype(images.dtype)
        made[::4], made[1::4] = 0, 1e3 * made[1::4]
    classes = rng.integers(0, 2, count).astype(labels.dtype)
    if not trainer.feed.resident:
        return lambda order, mask: tuple(
            put(x, place) for x in (made[order], classes[order], order, mask)
        ), count
    if images.nbytes <= LARGE:  # of the same shape: the program that is compiled anyway
        rest = len(images) - count
        made, classes = (
            np.concatenate([x, np.zeros((rest, *x.shape[1:]), x.dtype)]) for x in (made, classes)
        )
    made, classes = (put(x, replicated(trainer.mesh)) for x in (made, classes))
    return lambda order, mask: (made, classes, put(order, place), put(mask, place)), count


# The sampler.


def _sampler(trainer: Trainer) -> Iterator[Finding]:
    e, n = trainer.experiment, len(trainer.feed.labels if trainer.feed.resident else trainer.feed.photographs)
    q, steps = e.expected_batch_size / n, min(1000, max(20, DRAWS // n))
    other = update.reseeded(trainer, OWN_SEED)[0].sampler
    tables = []
    for sampler in (trainer.sampler, other):
        table = np.zeros((steps, n), bool)
        for step, row in enumerate(table):
            i = np.asarray(sampler.indices(step))
            row[i[(i >= 0) & (i < n)]] = True
            if row.sum() != len(i):
                yield (
                    False,
                    f"sampler: a batch must hold different examples of 0 to {n - 1}, not so that of step {step}",
                )
                return
        tables.append(table)
    if trainer.feed.resident and not all(_whole(trainer, step) for step in range(2)):
        yield False, "sampler: the physical batches of an update must hold all that is drawn, once"
        return
    wrong = _shuffled(tables, e.expected_batch_size) if e.sampler != "poisson" else _poisson(tables, q)
    of = f"{steps} batches of {n} examples, from two seeds"
    if wrong:
        yield (
            False,
            f"sampler: {', '.join(wrong)} ({of}); epsilon is that of {e.sampler} sampling with q = {q:.4g}",
        )
    elif e.sampler == "poisson":
        yield True, f"sampler: draws each example on its own with q = {q:.4g} ({of})"
    else:
        yield (
            True,
            f"sampler: batches of one size, no example twice ({of}); nominal, no epsilon is proven for it",
        )


def _whole(trainer: Trainer, step: int) -> bool:
    """Returns whether the physical batches together hold what the sampler draws."""
    parts = trainer.feed.batches(trainer.sampler, step, trainer.physical_batch_size)
    came = [np.asarray(fetch_replicated(i))[np.asarray(fetch_replicated(mask))] for *_, i, mask in parts]
    return sorted(np.concatenate([[], *came])) == sorted(trainer.sampler.indices(step))


def _shuffled(tables, size: int) -> list[str]:
    first, second = tables
    wrong = []
    if any((t.sum(1) != size).any() for t in tables):
        wrong.append(f"batches are not all of {size} examples")
    if size < first.shape[1] and ((first[1:] == first[:-1]).all(1).any() or (first == second).all()):
        wrong.append("a batch comes again")
    return wrong


def _poisson(tables: list[np.ndarray], q: float) -> list[str]:
    """Says what is wrong with batches, bool [steps, n] each; each count is binomial given earlier ones."""
    from scipy import stats

    (steps, n), wrong, rng = tables[0].shape, [], np.random.default_rng(OWN_SEED)
    alarm = (
        ALARM / 2 / 31
    )  # half of it is the noise's; 3 tests of each of 9 counts, 2 of each of 2 lists of sizes
    counts = {}
    for t, which in zip(tables, ("", " (another seed)"), strict=True):
        sizes, inclusions = t.sum(1), t.sum(0)
        counts |= {
            f"the size of batches{which}": (sizes, n),
            f"how often examples come{which}": (inclusions, steps),
            f"how many examples successive batches share{which}": ((t[1:] & t[:-1]).sum(1), sizes[:-1]),
            f"how many batches neighbouring examples share{which}": (
                (t[:, 1:] & t[:, :-1]).sum(0),
                inclusions[:-1],
            ),
        }
        for tail in (stats.binom.cdf(sizes.max(), n, q), stats.binom.sf(sizes.min() - 1, n, q)):
            if tail**steps < alarm:
                wrong.append(f"sizes of batches{which} are cut short at {sizes.min()} or {sizes.max()}")
    first, second = tables
    counts["how many examples two seeds share"] = ((first & second).sum(1), first.sum(1))
    for what, (count, trials) in counts.items():
        z = _normal(count, trials, q, rng)
        squares, total = _square(z), abs(z.sum()) / math.sqrt(len(z))
        p = [2 * stats.norm.sf(total), stats.chi2.cdf(squares, len(z)), stats.chi2.sf(squares, len(z))]
        if min(p) < alarm:
            wrong.append(f"{what} is not binomial (p = {min(p):.1g})")
    return wrong


def _normal(counts, trials, q: float, rng) -> np.ndarray:
    """Maps binomial counts to exactly standard normal numbers by their quantiles, ties broken at random."""
    from scipy import stats

    below, here = stats.binom.cdf(counts - 1, trials, q), stats.binom.pmf(counts, trials, q)
    return stats.norm.ppf(np.clip(below + rng.random(len(counts)) * here, 2.0**-53, 1 - 2.0**-53))
