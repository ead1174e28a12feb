"""What accelerators would be given: the programs of training, compiled for devices that are not there.

    make compiled                                       # installs the compilers (4.5 GB) into .compilers, then runs this
    python benchmarks/compiled.py --targets v5e --no-fits
    python benchmarks/compiled.py --requirements        # the wheels it needs, one a line

The first table is WRN-16-4 at K = 16 in half precision. Its unit is the compiler's own estimate of cycles on a TPU, and
on a GPU the bytes that all kernels read and write; "ratio" is to the non-private gradient of the same views, compiled
the same way. "ours" is the `accumulate` of training with augmentation, clipping and exact sums, in each formulation of the
weight gradients. None of this is a time: whether a GPU is fast at a program is measured with benchmarks/accelerator.py.

The second table says for every network of the presets colab and paper how many examples of a call fit the memory of the
devices that they are meant for. The last line is machine-readable; it takes the formulation with the lowest ratio.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import time
from collections.abc import Iterator

from hlo import Program
from targets import TARGETS, Target, enable, requirements

FOLDER = pathlib.Path(__file__).parents[1] / ".compilers"
NAME, VIEWS = "cifar10/wrn-16-4/eps1", 16
EXAMPLES = {"v5e": 8, "h100": 64, "a100": 64, "t4": 32}  # in a call of the first table
MANY = 16  # beyond, programs that are unrolled over examples take many minutes to compile
MEANT_FOR = {"colab": ("t4", "v5e"), "paper": ("a100", "h100", "v5e-8")}
MOST_VIEWS = {"tpu": 128, "gpu": 2048}  # in a call of the second table
SHARE = 0.9  # of the memory of a device that a call may take; the rest is for what lies beside it


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, the bytes that it holds on one device, and how long compiling took."""

    program: Program
    memory: int
    seconds: float


def compiled(jitted, *args) -> Compiled:
    from dpnb.training.devices import memory_of

    began = time.monotonic()
    made = jitted.lower(*args).compile()
    return Compiled(Program(made.as_text()), memory_of(made), time.monotonic() - began)


class Cell:
    """The programs of an experiment on the devices of a target, with shapes in place of arrays.

    A float16 network has loss scaling; public weights are left out, as shapes do not depend on them.
    """

    def __init__(self, experiment, target: Target, classes: int = 10, images: int = 50_000):
        import jax
        from flax import nnx

        from dpnb.data.recipe import SMALL_IMAGES, photographs
        from dpnb.models import functional
        from dpnb.models.precision import resolved
        from dpnb.models.registry import make_model

        self.target, self.mesh, self.images = target, target.mesh(), images
        sigma = experiment.noise_multiplier if experiment.noise_multiplier is not None else 1.0
        e = resolved(experiment, self.mesh.devices.flat[0])
        e = e.replace(pretrained="", trainable="all", noise_multiplier=sigma)
        self.experiment = e
        model = nnx.eval_shape(lambda: make_model(e, classes, nnx.Rngs(0)))
        self.params, self.apply = functional(model)
        self.params = jax.eval_shape(lambda: self.params)
        self.recipe = photographs(e.image_size) if e.image_size else SMALL_IMAGES
        self.side = e.image_size or 32

    def like(self, tree, sharding):
        """The same shapes, placed."""
        import jax

        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def array(self, shape, dtype, sharding):
        import jax

        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def floor(self, examples: int) -> Compiled:
        """The non-private gradient of the mean loss of as many views."""
        import jax

        from dpnb.training.loss import make_loss
        from dpnb.training.sharding import replicated

        whole, e = replicated(self.mesh), self.experiment
        loss = make_loss(self.apply)
        views = examples * max(e.augmult, 1)
        inputs = self.array((views, self.side, self.side, 3), "float32", whole)
        labels = self.array((views,), "int32", whole)
        grad = jax.jit(jax.grad(lambda p, x, y: loss(p, (x, y))[0].mean()))
        return compiled(grad, self.like(self.params, whole), inputs, labels)

    def totals(self):
        import jax

        from dpnb.training.sharding import batch_sharding
        from dpnb.training.state import Accumulator, BatchMetrics

        n, split = self.mesh.devices.size, batch_sharding(self.mesh)
        dtype = "int32" if self.experiment.noise_multiplier else "float32"
        gradient = jax.tree.map(lambda x: self.array((n, *x.shape), dtype, split), self.params)
        seen = [self.array((n,), "float32", split)] * len(BatchMetrics._fields)
        return Accumulator(gradient, BatchMetrics(*seen))

    def accumulate(self, examples: int, how: str = "auto") -> Compiled:
        """One physical batch, `examples` on every device."""
        from dpnb.training.sharding import batch_sharding, replicated
        from dpnb.training.update import make_accumulate, make_gradient

        e, side = self.experiment, self.side
        whole, split, n = replicated(self.mesh), batch_sharding(self.mesh), examples * self.mesh.devices.size
        grad, _ = make_gradient(e, self.apply, self.params, self.mesh, examples, self.target.memory)
        shape = None if e.image_size else (side, side, 3)
        large = self.recipe.enlarged if e.augmult else side
        images = self.array((n, large, large, 3), "uint8", split)
        labels = self.array((n,), "int32", split)
        if shape:
            images = self.array((self.images, side * side * 3), "uint8", whole)
            labels = self.array((self.images,), "int32", whole)
        run = make_accumulate(grad, e.augmult, self.mesh, self.recipe, shape, how)
        indices, mask = self.array((n,), "int32", split), self.array((n,), "bool", split)
        key = self.array((2,), "uint32", whole)
        params = self.like(self.params, whole)
        return compiled(run, params, self.totals(), images, labels, indices, mask, key)

    def update(self) -> Compiled:
        """All-reduce, noise, optimizer and EMA."""
        import jax
        import jax.numpy as jnp

        from dpnb.training.optimizer import make_optimizer
        from dpnb.training.sharding import replicated, state_shardings
        from dpnb.training.state import State
        from dpnb.training.update import make_update

        optimizer, whole = make_optimizer(self.experiment), replicated(self.mesh)
        zero, key = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
        kept = jax.eval_shape(optimizer.init, self.params)
        state = State(zero, self.params, self.params, kept, key)
        places = state_shardings(state, self.mesh, self.experiment.shard)
        noise = jax.tree.map(lambda x: self.array(x.shape, "int32", whole), self.params)
        run = make_update(self.experiment, 2.0**-16, optimizer, self.mesh, places)
        return compiled(run, self.like(state, whole), self.totals(), noise)


def amount(target: str, made: Compiled) -> float:
    """Millions of cycles a call, or millions of bytes."""
    return (made.program.cycles if TARGETS[target].is_tpu else made.program.moved) / 1e6


def per_view(target: str, made: Compiled, views: int) -> str:
    much = amount(target, made)
    if TARGETS[target].is_tpu:
        return f"{much:8.2f} Mcycles a call"
    kernels = sum(1 for _ in made.program.kernels())
    return f"{much / views:8.2f} MB a view, {kernels:5} kernels"


def main_table(target: str, formulations: list[str], say) -> dict[str, float]:
    """Prints the programs of WRN-16-4 on one target; the numbers of its formulation with the lowest ratio."""
    from dpnb import experiments

    examples = EXAMPLES[target]
    cell = Cell(experiments.get(NAME, augmult=VIEWS), TARGETS[target])
    views, f32 = examples * VIEWS, "f32"
    say(
        f"{TARGETS[target].name}, {cell.experiment.compute_dtype}, {examples} examples x {VIEWS} views a call"
    )

    def row(name, made, ratio=None):
        times = f"{ratio:5.2f}" if ratio else " " * 5
        text = f"  {name:<22} {per_view(target, made, views)}  {times}  {made.memory / 2**20:7,.0f} MiB"
        say(f"{text}  {made.program.convolutions(f32):3} f32 convolutions  ({made.seconds:.0f} s)")

    floor = cell.floor(examples)
    row("non-private", floor)
    best = None
    for how in formulations:
        if how == "unrolled" and examples > MANY:
            continue
        made = cell.accumulate(examples, how)
        ratio = amount(target, made) / amount(target, floor)
        row(f"ours, {how}", made, ratio)
        if best is None or ratio < best[0]:
            best = ratio, made
    update = cell.update()
    row("update of all weights", update)
    ratio, made = best
    if TARGETS[target].is_tpu:
        return {f"{target}_mcycles": amount(target, made), f"{target}_ratio": ratio}
    found = {f"{target}_ratio": ratio, f"{target}_mb": amount(target, made) / views}
    return found | {f"{target}_f32_calls": made.program.convolutions(f32)}


def networks(preset: str) -> list[str]:
    """The names of experiments that stand for all networks of a preset, those with the most views of each."""
    from dpnb import experiments

    found: dict[tuple, str] = {}
    for name in experiments.names():
        e = experiments.get(name, preset)
        if e.on_features or name.startswith("digits/"):
            continue
        key = e.network, e.depth, e.width, e.norm, e.standardised, e.image_size, e.noise_multiplier == 0
        if key not in found or e.augmult > experiments.get(found[key], preset).augmult:
            found[key] = name
    return list(found.values())


def fits(preset: str, targets: list[str], say) -> Iterator[dict]:
    """Prints how many examples a call of each network of a preset has room for, and yields the rows."""
    from dpnb import experiments
    from dpnb.models.registry import label
    from dpnb.results.plan import CLASSES

    for name in networks(preset):
        e = experiments.get(name, preset)
        for target in (t for t in MEANT_FOR[preset] if t in targets):
            began = time.monotonic()
            try:
                found = room(Cell(e, TARGETS[target], CLASSES.get(e.dataset, 10)))
            except Exception as error:  # the compiler's own refusal is an answer, too
                found = {"refused": str(error).splitlines()[0][:160]}
            text = f"does not fit: {found['refused']}" if "refused" in found else (
                f"{found['examples']:4} examples a call take {found['memory'] / 1e9:5.1f} of "
                f"{TARGETS[target].memory / 1e9:.0f} GB"
            )  # fmt: skip
            where = f"{preset:<6} {label(e):<34} K = {e.augmult:<2} {TARGETS[target].name:<22}"
            say(f"{where} {text}  ({name}, {time.monotonic() - began:.0f} s)")
            yield {"experiment": name, "preset": preset, "target": target, **found}


def room(cell: Cell) -> dict:
    """The largest call that fits, in examples that are a power of two, of at most `MOST_VIEWS`."""
    is_tpu, views = cell.target.is_tpu, max(cell.experiment.augmult, 1)
    most = MOST_VIEWS["tpu" if is_tpu else "gpu"]
    examples, why = 2 ** max(0, (most // views).bit_length() - 1), ""
    while examples:
        try:
            made = cell.accumulate(examples)
        except Exception as error:  # TPUs refuse what does not fit
            why = str(error).splitlines()[0][:160]
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        else:
            if made.memory <= SHARE * cell.target.memory:
                much = made.program.cycles if is_tpu else made.program.moved
                unit = "cycles" if is_tpu else "bytes"
                per_view = much / (examples * views)
                return {
                    "examples": examples,
                    "views": views,
                    "memory": made.memory,
                    f"{unit}_per_view": round(per_view),
                }
            why = f"one call takes {made.memory / 1e9:.1f} GB"
        examples //= 2
    return {"refused": why}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--compilers", type=pathlib.Path, default=FOLDER, help="folder of the wheels (default: %(default)s)"
    )
    parser.add_argument("--requirements", action="store_true", help="print the wheels, one a line, and stop")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument(
        "--formulations", nargs="+", default=["auto", "sliced", "grouped", "grouped_im2col", "unrolled"]
    )
    parser.add_argument("--out", type=pathlib.Path, help="file for the numbers, in JSON")
    parser.add_argument("--no-fits", dest="fits", action="store_false", help="leave the second table out")
    args = parser.parse_args(argv)
    if args.requirements:
        print("\n".join(requirements()))
        return
    if not (args.compilers / "libtpu").is_dir() or not (args.compilers / "nvidia").is_dir():
        raise SystemExit(f"no compilers in {args.compilers}: `make compiled` installs them there (4.5 GB)")
    enable(args.compilers)

    def say(text):
        print(text, flush=True)

    found: dict = {"jax": importlib.metadata.version("jax")}
    rows: list[dict] = []

    def keep():
        if args.out:
            args.out.write_text(json.dumps({**found, "networks": rows}, indent=1) + "\n")

    for target in (t for t in args.targets if t in EXAMPLES):
        found |= main_table(target, args.formulations, say)
        keep()
    if "v5e-8" in args.targets:
        from dpnb import experiments

        update = Cell(experiments.get(NAME, augmult=VIEWS), TARGETS["v5e-8"]).update()
        say(f"an update on {TARGETS['v5e-8'].name}: {', '.join(update.program.collectives())}")
    for preset in MEANT_FOR if args.fits else ():
        for row in fits(preset, args.targets, say):
            rows.append(row)
            keep()
    wanted = [
        "v5e_mcycles",
        "v5e_ratio",
        "h100_mb",
        "h100_ratio",
        "a100_ratio",
        "t4_mb",
        "t4_ratio",
        "t4_f32_calls",
    ]
    say(" ".join(f"{name}={found[name]:.4g}" for name in wanted if name in found))


if __name__ == "__main__":
    main()
