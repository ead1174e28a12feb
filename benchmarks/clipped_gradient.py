"""Time and memory of the clipped gradient, as ratios to the non-private gradient of the same views.

    python benchmarks/clipped_gradient.py                 # ours, about three minutes on two cores
    python benchmarks/clipped_gradient.py --peers         # and what else is installed, a quarter of an hour
    python benchmarks/clipped_gradient.py --depth 10 --width 1 --rounds 2    # a quick look

WRN-16-4 in float32, 64 views of 32x32x3: K = 16 views of 4 examples, 4 of 16, 1 of 64.
"non-private" is one jitted gradient of the mean loss of all 64 views.  "ours" is what
training runs: a Python loop over one jitted accumulate, its total donated.  Peers, each
measured where it can be imported: plain `vmap(grad)` with JAX's own rule for convolutions,
jax-privacy, torch.func and Opacus (in a process of their own, `torch_peer.py`).

The methods take turns, round after round, in one process, and a ratio is the median over
rounds of the quotient within a round.  Memory is XLA's own figure for temporary buffers.
The last line is machine-readable.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dpnb.gradients import clipped_grad, formulation
from dpnb.models import WideResNet, functional
from dpnb.models.layers import Conv

VIEWS = 64
# K: (examples in one call, examples differentiated at a time), on CPU.
BATCHES = {16: (2, 1), 4: (8, 2), 1: (32, 8)}
SLOW = 20.0  # seconds: a call that takes longer is measured once


class Method(NamedTuple):
    """Something that computes the clipped sum, its bytes of temporary memory, and its times."""

    run: Callable[[], Any]
    memory: int | None
    seconds: list[float]

    @property
    def milliseconds(self) -> float:
        """Per view."""
        return float(np.median(self.seconds)) * 1e3 / VIEWS

    def time_ratio(self, reference: "Method") -> float:
        """Median over rounds of the quotient within a round; of the medians if measured just once."""
        if len(self.seconds) == len(reference.seconds):
            return float(np.median(np.divide(self.seconds, reference.seconds)))
        return self.milliseconds / reference.milliseconds


def network(depth: int, width: int, plain: bool = False, dtype: str | None = None):
    """Parameters, loss per view of one example (images [K, 32, 32, 3], label), and mean loss of many views."""
    model = WideResNet(depth, width, dtype=dtype, rngs=nnx.Rngs(0))
    if plain:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Conv):
                module.gain = None
    params, apply = functional(model)

    def losses(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)

    def loss(params, example):
        images, label = example
        return losses(params, images, jnp.full(len(images), label))

    def batch_loss(params, examples):
        images, labels = examples
        flat = images.reshape(-1, *images.shape[2:])
        return losses(params, flat, jnp.repeat(labels, images.shape[1])).mean()

    return params, loss, batch_loss


def compiled(function, *args, donate=()):
    """The compiled function and its temporary memory in bytes."""
    program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    analysis = program.memory_analysis()
    return program, None if analysis is None else analysis.temp_size_in_bytes


def off(got, want) -> float:
    """||got - want|| / ||want||."""
    return float(optax.global_norm(jax.tree.map(jnp.subtract, got, want)) / optax.global_norm(want))


def non_private(params, batch_loss, examples) -> Method:
    program, memory = compiled(jax.grad(batch_loss), params, examples)
    return Method(lambda: program(params, examples), memory, [])


def ours(params, loss, examples, physical: int, micro: int | None) -> Method:
    grad = clipped_grad(loss, 1.0, rescale_to_unit_norm=True, microbatch_size=micro)
    size = len(examples[1])
    batches = [jax.tree.map(lambda x, i=i: x[i : i + physical], examples) for i in range(0, size, physical)]
    mask = jnp.ones(physical, bool)
    zero = jax.tree.map(jnp.zeros_like, params)
    program, memory = compiled(grad, params, batches[0], mask, zero, donate=3)

    def run():
        total = jax.tree.map(jnp.zeros_like, params)
        for batch in batches:
            total, _ = program(params, batch, mask, total)
        return total

    return Method(run, memory, [])


def textbook(params, loss, examples) -> Method:
    """`vmap(grad)`, clip, sum, of the whole batch; convolutions batched by JAX's own rule."""

    def clipped_sum(params, examples):
        grads = jax.vmap(jax.grad(lambda p, example: loss(p, example).mean()), (None, 0))(params, examples)
        norms = jax.vmap(optax.global_norm)(grads)
        factor = 1 / jnp.maximum(norms, 1.0)
        return jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), grads)

    with formulation("grouped"):
        program, memory = compiled(clipped_sum, params, examples)
    return Method(lambda: program(params, examples), memory, [])


def jax_privacy(params, loss, examples, micro: int | None, rule: str) -> Method:
    from jax_privacy import clipping

    grad = clipping.clipped_grad(
        lambda params, example: loss(params, example).mean(),
        l2_clip_norm=1.0,
        rescale_to_unit_norm=True,
        keep_batch_dim=False,
        microbatch_size=micro,
    )
    with formulation(rule):
        program, memory = compiled(grad, params, examples)
    return Method(lambda: program(params, examples), memory, [])


def methods_for(k: int, params, loss, batch_loss, peers: bool) -> dict[str, Method]:
    size = VIEWS // k
    images = jax.random.normal(jax.random.key(k), (size, k, 32, 32, 3))
    examples = images, jnp.arange(size) % 10
    physical, micro = BATCHES[k] if jax.default_backend() == "cpu" else (size, None)
    methods = {
        "non-private": non_private(params, batch_loss, examples),
        "ours": ours(params, loss, examples, physical, micro),
    }
    if not peers:
        return methods
    methods["vmap(grad)"] = textbook(params, loss, examples)
    try:
        libraries = {
            "jax-privacy": (None, "grouped"),
            "jax-privacy, microbatches": (physical, "grouped"),
            "jax-privacy, our rule": (None, "auto"),
        }
        for name, options in libraries.items():
            methods[name] = jax_privacy(params, loss, examples, *options)
    except ImportError as error:
        print(f"jax-privacy is left out: {error}", flush=True)
    return methods


def measure(methods: dict[str, Method], rounds: int) -> None:
    """One call to warm up, which checks that all methods agree, then `rounds` in turn."""
    slow = set()
    want = methods["ours"].run()
    for name, method in methods.items():
        start = time.perf_counter()
        got = jax.block_until_ready(method.run())
        seconds = time.perf_counter() - start
        if seconds > SLOW and name != "non-private":
            slow.add(name)
            method.seconds.append(seconds)
        if name != "non-private":
            apart = off(got, want)
            if not apart < 1e-2:  # a ReLU may flip in float32
                raise AssertionError(f"{name} must compute the same sum as ours, got {apart:.1e} off it")
    for _ in range(rounds):
        for name, method in methods.items():
            if name in slow:
                continue
            start = time.perf_counter()
            jax.block_until_ready(method.run())
            method.seconds.append(time.perf_counter() - start)


def torch_peers(args) -> dict[str, dict[str, float]]:
    """Milliseconds a view by method and K, measured in another process; {} without torch."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("torch_peer.py"))]
    command += [f"--depth={args.depth}", f"--width={args.width}", f"--rounds={args.rounds}", "--k"]
    command += [*map(str, args.k), *(["--plain-conv"] if args.plain_conv else [])]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        print("torch.func and Opacus are left out, see above", flush=True)
        return {}
    return json.loads(process.stdout.splitlines()[-1])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", action="store_true", help="measure the other libraries too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 4, 1], choices=BATCHES)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--plain-conv", action="store_true", help="without weight standardisation")
    args = parser.parse_args(argv)

    device = jax.devices()[0]
    kind = "plain" if args.plain_conv else "weight-standardised"
    print(f"WRN-{args.depth}-{args.width}, {kind} convolutions, float32, {VIEWS} views, {args.rounds} rounds")
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    print(f"{'K':>3} {'examples':>8}  {'method':<26} {'ms/view':>8} {'time':>6} {'MiB':>7} {'memory':>6}")
    params, loss, batch_loss = network(args.depth, args.width, args.plain_conv)
    ratios = dict.fromkeys(("ratio_k16", "ratio_k4", "ratio_k1", "memory_k16"), float("nan"))
    base = {}
    for k in args.k:
        methods = methods_for(k, params, loss, batch_loss, args.peers)
        measure(methods, args.rounds)
        reference = methods["non-private"]
        base[k] = reference.milliseconds
        for name, method in methods.items():
            ratio = method.time_ratio(reference)
            row(k, name, method.milliseconds, ratio, method.memory, reference.memory)
        ratios[f"ratio_k{k}"] = methods["ours"].time_ratio(reference)
        if k == 16 and reference.memory:
            ratios["memory_k16"] = methods["ours"].memory / reference.memory
    if args.peers:
        for name, by_k in torch_peers(args).items():
            for k, milliseconds in by_k.items():
                row(int(k), name, milliseconds, milliseconds / base[int(k)])
    print(" ".join(f"{name}={value:.3f}" for name, value in ratios.items()))


def row(k, name, milliseconds, ratio, memory=None, reference=None) -> None:
    used = f"{memory / 2**20:7.0f}" if memory else f"{'-':>7}"
    relative = f"{memory / reference:6.2f}" if memory and reference else f"{'-':>6}"
    print(f"{k:3} {VIEWS // k:8}  {name:<26} {milliseconds:8.2f} {ratio:6.2f} {used} {relative}", flush=True)


if __name__ == "__main__":
    main()
