"""How fast the whole update is on an accelerator, against its matrix peak and the non-private gradient.

    python benchmarks/accelerator.py                                      # on one GPU: about ten minutes
    python benchmarks/accelerator.py --curves --data-file cifar10.npz     # bfloat16 against float32, 100 updates
    python benchmarks/accelerator.py --depth 10 --width 1 --k 2 --views 16 32 --updates 1    # the road, on a CPU

First the ceilings of this device: a large matrix product in each precision, and a copy.  Then each
formulation of the per-example weight gradient is checked against float32 and timed in bfloat16 at the
first size; the fastest goes on to the other sizes and precisions, beside plain `vmap(grad)` and the
non-private gradient of the same views in the same process.  Then the whole update: sampling,
augmentation, clipping, noise, optimizer, EMA.  Every line is a JSON object in --out, kept when the
rest is cut off.

"share" is useful work over the measured bfloat16 peak: FLOP of the forward and backward pass as XLA
counts them (recomputation does not count), over the time.  Goals: ratio at most 1.15 and share at
least 0.25 at K = 16.
"""

import argparse
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from clipped_gradient import compiled, network, off, textbook

from dpnb import experiments
from dpnb.data import Dataset, Split, augment
from dpnb.data import load as load_data
from dpnb.gradients import FORMULATIONS, clipped_grad, formulation
from dpnb.training import cost, make_trainer, one_update
from dpnb.training.seeds import step_key
from dpnb.training.update import draw_noise

# name: (compute dtype, precision of matrix products)
PRECISIONS = {
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),  # what GPUs before Ampere have units for
    "tf32": ("float32", "tensorfloat32"),
    "float32": ("float32", "highest"),
}


def seconds(call, rounds: int) -> float:
    """Median over rounds, after one call to warm up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def ceilings(side: int, rounds: int, precisions=tuple(PRECISIONS)) -> dict[str, float]:
    """FLOP/s of a square matrix product on random data in each precision, bytes/s of a copy (read + written)."""
    found = {}
    for name in precisions:
        dtype, precision = PRECISIONS[name]
        a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        found[name] = 2 * side**3 / seconds(lambda f=product, a=a, b=b: f(a, b), rounds)
    x = jax.random.normal(jax.random.key(0), (side, side))
    copy = jax.jit(jnp.negative)
    found["copy"] = 2 * x.nbytes / seconds(lambda: copy(x), rounds)
    return found


def examples_of(views: int, k: int):
    """`views` random views, K of each example, and labels."""
    size = max(views // k, 1)
    return jax.random.normal(jax.random.key(1), (size, k, 32, 32, 3)), jnp.arange(size) % 10


def clipped_sum(params, loss, examples, how: str):
    """Our core, compiled, in one formulation: ((params, examples) -> sum, bytes of temporaries)."""
    grad = clipped_grad(loss, 1.0, rescale_to_unit_norm=True)
    with formulation(how):
        return compiled(lambda p, e: grad(p, e)[0], params, examples)


class Bench:
    """Times methods on one network, tells the log, and remembers what was fastest."""

    def __init__(self, args, say):
        self.args, self.say = args, say
        self.peaks = ceilings(args.side, args.rounds)
        say(what="ceilings", device=jax.devices()[0].device_kind, jax=jax.__version__, **self.peaks)
        e = experiments.get("cifar10/wrn-16-4/eps1", depth=args.depth, width=args.width, augmult=args.k)
        self.experiment = e.replace(noise_multiplier=9.119)  # PLD's; no accountant is needed here
        images = random_images(50_000)
        trainer = make_trainer(self.experiment, images, seed=0)
        self.flops = cost.flops_per_view(trainer.apply, trainer.state.params, images.shape)

    def row(self, what: str, views: int, took: float, **more) -> float:
        rate = views / took
        self.say(
            what=what, views=views, ms=1e3 * took, views_per_s=rate,
            share=rate * self.flops / self.peaks["bfloat16"], **more,
        )  # fmt: skip
        return rate

    def attempt(self, call):
        """None where it does not fit or does not compile; the rest goes on."""
        try:
            return call()
        except jax.errors.JaxRuntimeError as error:
            self.say(what="failed", why=str(error).splitlines()[0][:200])
            return None

    def formulations(self) -> str:
        """Each one checked against float32 and timed in bfloat16; the fastest."""
        views, k = self.args.views[0], self.args.k
        params, loss, _ = network(self.args.depth, self.args.width)
        few = examples_of(2 * k, k)
        with jax.default_matmul_precision("highest"):
            want = clipped_sum(params, loss, few, "unrolled")[0](params, few)
        _, half, _ = network(self.args.depth, self.args.width, dtype="bfloat16")
        examples, rates = examples_of(views, k), {}
        for how in self.args.formulations:

            def measure(how=how):
                with jax.default_matmul_precision("highest"):
                    exact = off(clipped_sum(params, loss, few, how)[0](params, few), want)
                if not exact < 1e-3:  # a ReLU may flip in float32
                    raise AssertionError(f"{how} must give the same sum in float32, got {exact:.1e} off it")
                rounded = off(clipped_sum(params, half, few, how)[0](params, few), want)
                began = time.perf_counter()
                program, memory = clipped_sum(params, half, examples, how)
                compiling = time.perf_counter() - began
                took = seconds(lambda: program(params, examples), self.args.rounds)
                rates[how] = self.row(
                    "ours", views, took, precision="bfloat16", formulation=how, off_float32=exact,
                    off_bfloat16=rounded, temporaries=memory, compile_s=compiling,
                )  # fmt: skip

            self.attempt(measure)
        return max(rates, key=rates.get)

    def compare(self, precision: str, views: int, how: str) -> float:
        """Ours, non-private and plain vmap of the same views; views/s of ours."""
        dtype, products = PRECISIONS[precision]
        params, loss, batch_loss = network(self.args.depth, self.args.width, dtype=dtype)
        examples = examples_of(views, self.args.k)

        def measure():
            with jax.default_matmul_precision(products):
                program, memory = clipped_sum(params, loss, examples, how)
                plain, plain_memory = compiled(jax.grad(batch_loss), params, examples)
            mine = seconds(lambda: program(params, examples), self.args.rounds)
            base = seconds(lambda: plain(params, examples), self.args.rounds)
            same = dict(precision=precision, formulation=how)
            self.row("non-private", views, base, temporaries=plain_memory, **same)
            return self.row("ours", views, mine, temporaries=memory, ratio=mine / base, **same)

        rate = self.attempt(measure) or 0.0
        if self.args.vmap and views == self.args.views[0]:

            def naive():
                with jax.default_matmul_precision(products):
                    method = textbook(params, loss, examples)
                self.row("vmap(grad)", views, seconds(method.run, 1), precision=precision)

            self.attempt(naive)
        return rate

    def whole_update(self, precision: str, views: int, how: str) -> None:
        """One private update of the table's size on 50,000 images on the device, and its parts."""
        dtype, products = PRECISIONS[precision]
        size, e = max(views // self.args.k, 1), self.experiment
        e = e.replace(compute_dtype=dtype, physical_batch_size=size)
        if self.args.batch:
            e = e.replace(expected_batch_size=self.args.batch)
        with jax.default_matmul_precision(products), formulation(how):
            trainer = make_trainer(e, random_images(50_000), seed=0)
            state, took = trainer.state, []
            for update in range(self.args.updates + 1):  # the first compiles
                began = time.perf_counter()
                state, seen = jax.block_until_ready(one_update(trainer, state))
                if update:
                    took.append((time.perf_counter() - began) / float(seen.examples))
        per_update = float(np.median(took)) * e.expected_batch_size
        self.row(
            "update", e.expected_batch_size * max(e.augmult, 1), per_update, precision=precision,
            formulation=how, physical_views=size * max(e.augmult, 1), updates=len(took),
            hours_eps1=per_update * 875 / 3600,
        )  # fmt: skip
        few = jnp.arange(size)
        one = jax.jit(
            lambda images, key: jax.vmap(augment.views, (0, 0, None))(
                jax.random.split(key, size), images, e.augmult
            )
        )
        key = step_key(state.key, state.step)
        drawn = trainer.feed.images[few].reshape(-1, 32, 32, 3)  # they are kept in rows
        self.row("augmentation", views, seconds(lambda: one(drawn, key), self.args.rounds))
        noise = draw_noise(trainer, 0)
        took = seconds(lambda: trainer.update(state, trainer.zero(), noise), self.args.rounds)
        self.say(what="adding noise, optimizer, EMA", ms=1e3 * took)
        # On the host, while the device still adds up gradients: it costs time only where it takes longer than they.
        took = seconds(lambda: draw_noise(trainer, 0), self.args.rounds)
        self.say(what="drawing noise", ms=1e3 * took, share_of_update=took / per_update)


@functools.cache
def random_images(n: int) -> Dataset:
    """Noise in the shape of CIFAR-10."""
    rng = np.random.default_rng(0)
    splits = [
        Split(rng.integers(0, 256, (size, 32, 32, 3), np.uint8), (np.arange(size) % 10).astype(np.int32))
        for size in (n, 16)
    ]
    return Dataset("noise", *splits, tuple("0123456789"), "")


def curves(args, say) -> None:
    """Training loss of float32 and bfloat16 over the same batches, views and noise."""
    images = load_data("cifar10", file=args.data_file) if args.data_file else load_data("digits")
    e = experiments.get("cifar10/wrn-16-4/eps1", depth=args.depth, width=args.width, augmult=args.k)
    e = e.replace(noise_multiplier=9.119, expected_batch_size=args.batch or 4096)
    e = e.replace(physical_batch_size=max(args.views[0] // args.k, 1))
    ends = {}
    for dtype in ("float32", "bfloat16"):
        # The seed is shared on purpose, which no two releases may: this is not a private run.
        trainer = make_trainer(e.replace(compute_dtype=dtype), images, seed=0)
        state, losses = trainer.state, []
        for _ in range(args.curve_updates):
            state, seen = one_update(trainer, state)
            losses.append(float(seen.loss / jnp.maximum(seen.examples, 1)))
        ends[dtype] = state.params
        say(what="curve", precision=dtype, data=images.name, batch=e.expected_batch_size, losses=losses)
    say(what="curves", parameters_apart=off(ends["bfloat16"], ends["float32"]))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--views", type=int, nargs="+", default=[1024, 256, 4096], help="per call")
    parser.add_argument("--formulations", nargs="+", default=FORMULATIONS[1:], choices=FORMULATIONS[1:])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--batch", type=int, help="expected batch size (default: the table's)")
    parser.add_argument("--side", type=int, help="of the matrices (default 8192; 1024 on a CPU)")
    parser.add_argument("--no-vmap", dest="vmap", action="store_false", help="leave plain vmap(grad) out")
    parser.add_argument("--curves", action="store_true", help="only the loss curves of float32 and bfloat16")
    parser.add_argument("--curve-updates", type=int, default=100)
    parser.add_argument("--data-file", help="prepared array file for the curves (default: digits)")
    parser.add_argument("--out", type=pathlib.Path, help="file of JSON lines, appended to")
    args = parser.parse_args(argv)
    args.side = args.side or (1024 if jax.default_backend() == "cpu" else 8192)

    def say(**found):
        text = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
        print(json.dumps(text), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(found) + "\n")

    if args.curves:
        return curves(args, say)
    bench = Bench(args, say)
    how = bench.formulations()
    rates = {views: bench.compare("bfloat16", views, how) for views in args.views}
    best = max(rates, key=rates.get)
    for precision in args.precisions:
        if precision != "bfloat16":
            bench.compare(precision, args.views[0], how)
    for precision in args.precisions:
        bench.attempt(lambda p=precision: bench.whole_update(p, best, how))


if __name__ == "__main__":
    main()
