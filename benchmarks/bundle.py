"""Packs all that a machine without a network needs to yield a record: wheels, the package, the data, and one script.

    make bundle                                                                # into `bundle`, for CUDA 12 and this Python
    python benchmarks/bundle.py OUT --accelerator tpu --python 3.12 --data-dir TFDS
    python benchmarks/bundle.py OUT --accelerator cpu --data digits            # for trying it

On the machine, `sh OUT/run.sh --minutes 55` makes an environment from the wheels, without an index, and then benchmarks/sitting.py
measures every formulation of the gradient and trains the cell that fits the minutes left.  The same command goes on.  What comes of it
is in OUT/out.

With `--accelerator present` the machine has JAX, Flax, Optax and Orbax for its accelerator, and only what they lack is packed.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
BASE = ("flax", "optax", "orbax-checkpoint", "numpy")
BESIDE = ("dp-accounting", "safetensors", "scipy", "tqdm")  # notebooks, TFDS and figures are left at home
JAX = {"cuda12": "jax[cuda12]", "cuda13": "jax[cuda13]", "tpu": "jax[tpu]", "cpu": "jax", "present": "jax"}
SCRIPTS = ("sitting.py", "cell.py", "accelerator.py", "clipped_gradient.py")
RUN = """#!/bin/sh
# sh run.sh --minutes M [--preset P] [--cells NAME ...]: one sitting, see benchmarks/sitting.py. The same command goes on.
set -e
since=$(date +%s)
here=$(cd "$(dirname "$0")" && pwd)
python=${{PYTHON:-python3}}
if ! "$python" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "{python}")'; then
    echo "run.sh: the wheels are for Python {python}, but $python is another; name one by PYTHON=..., or pack for it" >&2
    exit 2
fi
if [ ! -e "$here/env/.made" ]; then
    {make}
    touch "$here/env/.made"
fi
exec {start} "$here/benchmarks/sitting.py" "$here/out" --since "$since" --data-file "$here/data/{data}.npz" "$@"
"""
INSTALL = '-m pip install -q --no-index --no-deps --find-links "$here/wheels" -r "$here/wheels.txt"'
# How the environment is made, and Python started in it: one of its own, or a folder beside that of a Python which has JAX.
OWN = {
    "make": f'"$python" -m venv "$here/env"\n    "$here/env/bin/python" {INSTALL}',
    "start": '"$here/env/bin/python"',
}
BESIDE_JAX = {
    "make": f'"$python" {INSTALL} --target "$here/env"',
    "start": 'env PYTHONPATH="$here/env" "$python"',
}


def call(*words, given: str | None = None) -> str:
    """Runs this Python with these words and input; its output. It ends the script if it fails, with what it said."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def resolved(packages, python: str, arch: str) -> dict[str, str]:
    """{name: version} of packages and all that they need there, in the versions of constraints.txt."""
    target = ["--python-version", python, "--python-platform", f"{arch}-manylinux_2_31"]
    shape = ["-q", "--no-annotate", "--no-header", "--constraint", ROOT / "constraints.txt"]
    said = call("-m", "uv", "pip", "compile", "-", *target, *shape, given="\n".join(packages))
    lines = (line.split(";")[0].strip() for line in said.splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def wheels(out: pathlib.Path, accelerator: str, python: str, arch: str) -> list[str]:
    """Downloads the wheels to `out`, builds that of dpnb beside them, and returns the requirements."""
    jax = [JAX[accelerator], *BASE]
    versions = resolved([*jax, *BESIDE], python, arch)
    if accelerator == "present":
        there = resolved(jax, python, arch)
        versions = {name: version for name, version in versions.items() if name not in there}
    pinned = [f"{name}=={version}" for name, version in versions.items()]
    names = [f"manylinux_2_{minor}" for minor in range(31, 4, -1)] + ["manylinux2014", "manylinux2010"]
    platforms = [word for name in names for word in ("--platform", f"{name}_{arch}")]
    target = ["--only-binary=:all:", "--python-version", python, *platforms]
    call("-m", "pip", "download", "-q", "--no-deps", "-d", out, *target, *pinned)
    call("-m", "pip", "wheel", "-q", "--no-deps", "-w", out, ROOT)
    return [*pinned, "dpnb"]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path, help="folder, which must not exist")
    parser.add_argument("--accelerator", choices=JAX, default="cuda12")
    parser.add_argument(
        "--python", default="{}.{}".format(*sys.version_info), help="version there (default: %(default)s)"
    )
    parser.add_argument("--arch", choices=("x86_64", "aarch64"), default="x86_64", help="of its Linux")
    parser.add_argument("--data", default="cifar10", help="data set (default: %(default)s)")
    parser.add_argument("--data-dir", help="TFDS directory that it is read from")
    parser.add_argument("--data-file", help="array file in place of it")
    args = parser.parse_args(argv)

    from dpnb import data

    if args.out.exists():
        raise SystemExit(f"{args.out} must not exist; delete it, or choose another folder")
    loaded = data.load(args.data, data_dir=args.data_dir, file=args.data_file)  # before gigabytes are fetched
    for folder in ("wheels", "data", "benchmarks"):
        (args.out / folder).mkdir(parents=True)
    data.save(loaded, args.out / "data" / f"{loaded.name}.npz")
    for name in SCRIPTS:
        shutil.copy(ROOT / "benchmarks" / name, args.out / "benchmarks")
    pinned = wheels(args.out / "wheels", args.accelerator, args.python, args.arch)
    (args.out / "wheels.txt").write_text("\n".join(pinned) + "\n")
    environment = BESIDE_JAX if args.accelerator == "present" else OWN
    script = RUN.format(python=args.python, data=loaded.name, **environment)
    (args.out / "run.sh").write_text(script)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 2**20:,.0f} MiB for Python {args.python} on {args.arch}, {args.accelerator}")
    print(f"there: sh {args.out.name}/run.sh --minutes 55")


if __name__ == "__main__":
    main()
