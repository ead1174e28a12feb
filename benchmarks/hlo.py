"""Reads a compiled program's text: what it moves, what it computes in, and how its devices talk.

Nothing here is a time. TPU programs carry the compiler's own estimate of cycles, operation by operation; of GPU
programs the bytes are counted that every kernel reads and writes: its results and its operands, and of an operand
that a kernel only slices or gathers the part that it reads.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
NO_KERNEL = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "iota",
    "partition-id",
}
READS_PART = {"slice", "dynamic-slice", "gather"}
COLLECTIVE = re.compile(r"^(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?$")


def size_of(shape: str) -> int:
    """Returns the bytes of the arrays in the text of a shape.

    >>> size_of("(bf16[2,3]{1,0}, f32[])")
    16
    """
    return sum(
        SIZES.get(t, 0) * math.prod(map(int, filter(None, d.split(",")))) for t, d in ARRAY.findall(shape)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    number: int  # of a parameter, else 0


def instruction(line: str) -> Instruction | None:
    """Parses a line; None if it is not an instruction."""
    if not (match := LINE.match(line)):
        return None
    shape, rest = _balanced(match[2]) if match[2].startswith("(") else match[2].split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    inside, attributes = _balanced("(" + rest)
    number = int(inside[1:-1]) if opcode == "parameter" else 0
    return Instruction(match[1], shape, opcode, re.findall(r"%([\w.-]+)", inside), attributes, number)


def _balanced(text: str) -> tuple[str, str]:
    """Splits after the parenthesis that closes the first."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"parentheses must be balanced, got {text[:80]!r}")


class Program:
    """The text of a compiled program, `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        found: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := HEAD.match(line):
                found = self.computations[head[2]] = {}
                if head[1]:
                    self.entry = found
            elif made := instruction(line):
                found[made.name] = made

    def kernels(self) -> Iterator[Instruction]:
        """Yields what runs on the device."""
        yield from (i for i in self.entry.values() if i.opcode not in NO_KERNEL)

    def everything(self) -> Iterator[Instruction]:
        """Yields the instructions of all computations."""
        for computation in self.computations.values():
            yield from computation.values()

    def bytes_moved(self, kernel: Instruction) -> int:
        """Returns the bytes that a kernel reads and writes."""
        called = re.search(r"calls=%?([\w.-]+)", kernel.attributes)
        fused = self.computations.get(called[1], {}) if called else {}
        reads = [size_of(self.entry[name].shape) for name in kernel.operands if name in self.entry]
        for parameter in (i for i in fused.values() if i.opcode == "parameter"):
            users = [i for i in fused.values() if parameter.name in i.operands]
            if users and all(u.opcode in READS_PART and u.operands[0] == parameter.name for u in users):
                part = sum(size_of(u.shape) for u in users)
                reads[parameter.number] = min(reads[parameter.number], part)
        return size_of(kernel.shape) + sum(reads)

    @property
    def moved(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(map(self.bytes_moved, self.kernels()))

    @property
    def cycles(self) -> int:
        """The compiler's estimate, TPU only."""
        found = (re.search(r'"estimated_cycles":"(\d+)"', i.attributes) for i in self.entry.values())
        return sum(int(m[1]) for m in found if m)

    def convolutions(self, dtype: str) -> int:
        """Returns the number of convolutions whose result or any operand has this dtype, `f32` for instance."""
        calls = [i for i in self.everything() if i.opcode == "convolution" or "__cudnn$conv" in i.attributes]
        calls = [
            i for i in calls if re.search(r"dim_labels=\w*1", i.attributes)
        ]  # of two dimensions or more; others are products
        count = 0
        for call in calls:
            home = next(c for c in self.computations.values() if c.get(call.name) is call)
            shapes = [call.shape, *(home[o].shape for o in call.operands[:2] if o in home)]
            count += any(ARRAY.findall(shape)[0][0] == dtype for shape in shapes)
        return count

    def collectives(self) -> list[str]:
        """Returns the operations by which devices exchange numbers."""
        return [m[1] for i in self.everything() if (m := COLLECTIVE.match(i.opcode))]

    def copies_of(self, shape: str) -> list[str]:
        """Returns the names of instructions, parameters and views apart, whose result is an array of this shape.

        Args:
          shape: with its dtype, "u8[50000,3072]".
        """
        views = NO_KERNEL | {"copy-done", "reshape"}
        return [i.name for i in self.everything() if i.opcode not in views and i.shape.startswith(shape)]
