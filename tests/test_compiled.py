"""Programs for accelerators, compiled without one: what must never come back."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import shared_runs

BENCHMARKS = shared_runs.ROOT / "benchmarks"
CONVOLUTIONS = 10  # of a WRN-10-1
COMPILERS = shared_runs.ROOT / ".compilers"
sys.path.insert(0, str(BENCHMARKS))

import hlo  # noqa: E402
import targets  # noqa: E402

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p.0: f32[8,4], p.1: s32[2]) -> f32[2,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = s32[2]{0} parameter(1)
  ROOT %gather.1 = f32[2,4]{1,0} gather(%p.0, %p.1), offset_dims={1}
}

ENTRY %main (a: f32[8,4], b: s32[2]) -> (f32[2,4], bf16[2,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %b = s32[2]{0} parameter(1)
  %fusion.1 = f32[2,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  %convert.2 = bf16[2,4]{1,0} convert(%fusion.1), backend_config={"estimated_cycles":"5"}
  %cudnn-conv.1 = (f32[2,4]{1,0}, u8[0]{0}) custom-call(%convert.2, %convert.2), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %all-reduce.1 = f32[2,4]{1,0} all-reduce(%fusion.1), to_apply=%sum
  ROOT %tuple.3 = (f32[2,4]{1,0}, bf16[2,4]{1,0}) tuple(%fusion.1, %convert.2)
}
"""


def test_a_program_is_read():
    program = hlo.Program(PROGRAM)
    fusion, convert, convolution, collective = program.kernels()
    assert program.bytes_moved(fusion) == 32 + 32 + 8  # result, the part of `a` that it gathers, the indices
    assert program.bytes_moved(convert) == 32 + 16
    assert program.cycles == 75
    assert program.convolutions("f32") == 1 and program.convolutions("s32") == 0
    assert program.collectives() == ["all-reduce"] and collective.opcode == "all-reduce"
    assert program.copies_of("bf16[2,4]") == ["convert.2"]


def test_the_compilers_are_those_that_jax_asks_for():
    wheels = targets.requirements()
    assert wheels[0].startswith("libtpu==") and any(w.startswith("jax-cuda12-plugin==") for w in wheels)


def test_without_compilers_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "benchmarks/compiled.py", "--compilers", str(tmp_path)]
    done = subprocess.run(command, cwd=shared_runs.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "make compiled" in done.stderr and len(done.stderr.splitlines()) == 1


def libtpu() -> pathlib.Path | None:
    """The folder from which libtpu can be imported, if there is one."""
    import importlib.util

    if found := importlib.util.find_spec("libtpu"):
        return pathlib.Path(found.origin).parents[1]
    return COMPILERS if (COMPILERS / "libtpu").is_dir() else None


SMALL = """
import json, sys
import targets
targets.enable(sys.argv[1])
import compiled
from dpnb import experiments
e = experiments.get("cifar10/wrn-16-4/eps1", depth=10, width=1, augmult=2)
call = compiled.Cell(e, targets.TARGETS["v5e"]).accumulate(4).program
update = compiled.Cell(e, targets.TARGETS["v5e-8"]).update().program
per_example = [i for i in call.everything() if i.opcode == "convolution" and "lhs_dilate" in i.attributes]
print(json.dumps({
    "copies": call.copies_of("u8[50000,3072]"),
    "float32": call.convolutions("f32"),
    "half": call.convolutions("bf16"),
    "windows": [i.attributes.split("window={", 1)[1].split("}")[0] for i in per_example],
    "collectives": update.collectives(),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(libtpu() is None, reason="libtpu is not here: `make compiled` installs it")
def test_a_small_network_for_tpus():
    """No copy of the data set, no float32 convolution, examples as batch dimensions, one all-reduce an update."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "PYTHONPATH": shared_runs.python_path(BENCHMARKS, shared_runs.ROOT),
    }
    command = [sys.executable, "-c", SMALL, str(libtpu())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["copies"] == [] and found["float32"] == 0 and found["half"] > 25
    assert found["collectives"] == ["all-reduce"]
    # As batch dimensions of a matrix product, which keep examples apart: the window steps over all but its own.
    batched = re.compile(r"size=\d+x\d+x4 stride=1x1x3 .*lhs_dilate=1x1x4")
    assert sum(bool(batched.match(window)) for window in found["windows"]) == CONVOLUTIONS
