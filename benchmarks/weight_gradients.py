"""Which formulation of the per-example weight gradient is fastest, convolution by convolution.

    python benchmarks/weight_gradients.py                                # WRN-16-4 on one GPU: two minutes
    python benchmarks/weight_gradients.py --examples 2 --views 4 --dtype float32 --rounds 2    # on a CPU

For each convolution of the network: microseconds per view of every formulation of
`dpnb.gradients.convolution`, and of the weight gradient of all examples together, which is the floor.
"error" is the relative distance from the float32 sum of all examples.  Every line is a JSON object in
--out.  The last line names the fastest of each shape, and what all convolutions of these shapes take together.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from accelerator import seconds

from dpnb.gradients import FORMULATIONS, formulation
from dpnb.gradients.convolution import conv_general_dilated

# (side, kernel, channels in, channels out, stride) of WRN-16-4, and how many of its convolutions have that shape.
SHAPES = {
    (32, 3, 64, 64, 1): 3,
    (16, 3, 128, 128, 1): 3,
    (8, 3, 256, 256, 1): 3,
    (32, 3, 16, 64, 1): 1,
    (32, 3, 64, 128, 2): 1,
    (16, 3, 128, 256, 2): 1,
    (32, 3, 3, 16, 1): 1,
}
FLOOR = "all together"


def gradients(shape, how: str):
    """(images, cotangents) -> weight gradients [examples, ...], or their sum for `FLOOR`."""
    _, kernel, cin, cout, stride = shape

    def one(x, g):
        w = jnp.zeros((kernel, kernel, cin, cout), x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        conv = lambda w: conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=layout)
        return jax.vjp(conv, w)[1](g)[0]

    if how == FLOOR:
        return lambda x, g: one(*(a.reshape(-1, *a.shape[2:]) for a in (x, g)))
    return jax.vmap(one)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--views", type=int, default=16, help="of each example")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--formulations", nargs="+", default=FORMULATIONS[1:], choices=FORMULATIONS[1:])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no measurement after so many")
    parser.add_argument("--out", type=pathlib.Path, help="file of JSON lines, appended to")
    args = parser.parse_args(argv)
    began, fastest, least = time.monotonic(), {}, {FLOOR: 0.0, "fastest": 0.0}
    for shape in list(SHAPES)[: args.shapes]:
        side, _, cin, cout, stride = shape
        n = args.examples, args.views
        x = jax.random.normal(jax.random.key(0), (*n, side, side, cin), args.dtype)
        g = jax.random.normal(jax.random.key(1), (*n, side // stride, side // stride, cout), args.dtype)
        took, exact = {}, None
        for how in (FLOOR, *args.formulations):
            if time.monotonic() - began > args.seconds:
                break
            found = {"shape": shape, "formulation": how, "views": n[0] * n[1], "dtype": args.dtype}
            try:
                start = time.monotonic()
                with formulation("auto" if how == FLOOR else how):
                    program = jax.jit(gradients(shape, how)).lower(x, g).compile()
                found["compile_s"] = time.monotonic() - start
                took[how] = seconds(lambda program=program: program(x, g), args.rounds)
                got = program(x, g).astype(jnp.float32)
                got = got if how == FLOOR else got.sum(0)
                exact = got if exact is None else exact
                found["error"] = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
                found["us_per_view"] = 1e6 * took[how] / n[0] / n[1]
                found["temporaries"] = program.memory_analysis().temp_size_in_bytes
            except jax.errors.JaxRuntimeError as error:
                found["failed"] = str(error).splitlines()[0][:200]
            print(
                json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}),
                flush=True,
            )
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        per_network = 1e6 * SHAPES[shape] / n[0] / n[1]
        least[FLOOR] += per_network * took.pop(FLOOR, float("nan"))
        if took:
            fastest["x".join(map(str, shape))] = min(took, key=took.get)
        least["fastest"] += per_network * min(took.values(), default=float("nan"))
    print(json.dumps({"device": jax.devices()[0].device_kind, "fastest": fastest, "us_per_view": least}))


if __name__ == "__main__":
    main()
