"""Says what a cell would take on accelerators, before one is rented."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

from dpnb import folders
from dpnb.experiments import Experiment, get, imagenet
from dpnb.models.registry import label

# What benchmarks/compiled.py found with `--out`.
COMPILED = folders.RECORDS / "accelerators" / "compiled.json"
CLASSES = {"cifar100": 100, "tiny_imagenet32": 200, "places365_small": 365, "imagenet2012": 1000}
CLASSES |= {"imagenet_resized/32x32": 1000, "textures": 100}  # of all others 10
NETWORK = ("network", "depth", "width", "norm", "standardised", "image_size")


class Device(NamedTuple):
    """An accelerator, or several of a kind: how records name it, and its data sheet.

    memory: bytes of one; peak: FLOP/s of all in half precision; bandwidth: bytes/s of one.
    """

    name: str
    kind: str
    target: str
    memory: float
    peak: float
    bandwidth: float
    count: int = 1


DEVICES = (
    Device("T4", "Tesla T4", "t4", 15.8e9, 65e12, 0.32e12),
    Device("TPU v5e", "TPU v5 lite", "v5e", 16e9, 197e12, 0.82e12),
    Device("A100", "NVIDIA A100", "a100", 85.1e9, 312e12, 2.04e12),
    Device("H100", "NVIDIA H100", "h100", 84.9e9, 989e12, 3.35e12),
    Device("TPU v5e-8", "TPU v5 lite", "v5e", 16e9, 8 * 197e12, 0.82e12, 8),
)
# Measured on one H100 (docs/performance.md): WRN-16-4 took 17.8 us a view of 2.2 GFLOP.
OF_PEAK = 2.2e9 / 17.8e-6 / 989e12
OF_BANDWIDTH = 0.6
CLOCK = 1.5e9  # of a TPU v5e, cycles a second


class Row(NamedTuple):
    """What one device would take: hours, examples of a call with their memory (None if unknown), how that is known."""

    device: str
    hours: float
    examples: int | None
    memory: int | None
    how: str


class Work(NamedTuple):
    """What a run computes: so many views, of `flops` each, and how to say it."""

    views: float
    flops: float
    words: str


def work_of(e: Experiment, flops: float | None = None) -> Work:
    """Returns the views of a whole run, forward and backward, or the photographs that features are made of, forward.

    Args:
      flops: of one view, forward and backward, if known.
    Raises:
      ValueError: the number of updates is not known, or features of small images are all that is computed.
    """
    if e.on_features:
        network = e.network, e.depth, e.image_size
        if e.dataset not in imagenet.EXAMPLES or network not in imagenet.FORWARD:
            raise ValueError(
                f"{e.name} trains on features that are computed once, which takes minutes on a CPU; run it"
            )
        images = imagenet.EXAMPLES[e.dataset]
        return Work(images, 2 * imagenet.FORWARD[network], f"features of {images:,} photographs, once")
    if e.steps is None:
        raise ValueError(f"{e.name}: the number of updates must be known, got None; add --set steps=T")
    views = e.steps * e.expected_batch_size * max(e.augmult, 1)
    words = f"{e.steps:,} updates x {e.expected_batch_size:,} examples x {max(e.augmult, 1)} views = {views:.3g} views"
    return Work(views, flops_of(e)[1] if flops is None else flops, words)


@functools.cache
def flops_of(e: Experiment) -> tuple[int, float]:
    """Returns the number of parameters, and FLOP of one view forward and backward, as XLA counts them unoptimised."""
    import jax
    from flax import nnx

    from dpnb.models import functional
    from dpnb.models.registry import make_network
    from dpnb.training import cost

    classes = CLASSES.get(e.dataset, 10)
    bare = e.replace(pretrained="", trainable="all", compute_dtype="float32")
    params, apply = functional(nnx.eval_shape(lambda: make_network(bare, classes, nnx.Rngs(0))))
    side = e.image_size or 32
    flops = cost.flops_per_view(apply, params, (side, side, 3))
    return sum(p.size for p in jax.tree.leaves(params)), flops


def same_network(e: Experiment, fields: dict[str, Any]) -> bool:
    """Returns whether hyper-parameters are of the network of an experiment, with as many views."""
    return all(fields.get(name, getattr(e, name)) == getattr(e, name) for name in (*NETWORK, "augmult"))


def measured(e: Experiment, device: Device, records: list[dict[str, Any]]) -> tuple[float, str] | None:
    """Returns views a second of the fastest record of this network on such devices, and which it is."""
    found = []
    for r in records:
        count, _, kind = r["devices"].partition(" x ")
        if (
            r["seconds"]  # which released records of secret runs do not tell
            and kind.startswith(device.kind)
            and count == str(device.count)
            and same_network(e, r["hyper_parameters"])
        ):
            h = r["hyper_parameters"]
            views = r["privacy"]["steps"] * h["expected_batch_size"] * max(h["augmult"], 1)
            found.append(
                (views / r["seconds"], f"{r['experiment']} [{r['preset']}, finished {r['finished'][:10]}]")
            )
    return max(found, default=None)


def compiled(e: Experiment, device: Device) -> dict[str, Any] | None:
    """Returns what the compiled program of this network for such a device needs; None if it was not compiled.

    Of several, private or not like the experiment, the one whose number of views is nearest.
    """
    rows = json.loads(COMPILED.read_text())["networks"] if COMPILED.exists() else []
    found = []
    for row in (r for r in rows if r["target"].partition("-")[0] == device.target):
        other = get(row["experiment"], row["preset"])
        same = all(getattr(other, name) == getattr(e, name) for name in NETWORK)
        if same and (other.noise_multiplier == 0) == (e.noise_multiplier == 0):
            found.append((abs(other.augmult - e.augmult), len(found), row))
    return min(found)[2] if found else None


def rows(e: Experiment, work: Work, records: list[dict[str, Any]]) -> list[Row]:
    """Returns a row for each of `DEVICES`: from records if there are any, else computed."""
    return [row_of(device, e, work, records) for device in DEVICES]


def row_of(device: Device, e: Experiment, work: Work, records: list[dict[str, Any]]) -> Row:
    """Returns the row of one device: from records if there are any, else computed."""
    row = {} if e.on_features else compiled(e, device) or {}
    if "refused" in row:
        return Row(device.name, float("nan"), None, None, f"computed: does not fit, {row['refused']}")
    if fastest := None if e.on_features else measured(e, device, records):
        seconds, how = 1 / fastest[0], f"measured: {fastest[0]:,.0f} views a second, {fastest[1]}"
    elif "cycles_per_view" in row:
        seconds = row["cycles_per_view"] / CLOCK / device.count
        how = f"computed: {row['cycles_per_view']:,} cycles a view, the compiler's estimate, at {CLOCK / 1e9} GHz"
    else:  # what takes longer
        seconds = work.flops / device.peak / OF_PEAK
        how = f"computed: {work.flops / 1e9:.3g} GFLOP a view at {OF_PEAK:.0%} of the peak"
        moving = row.get("bytes_per_view", 0) / device.bandwidth / OF_BANDWIDTH / device.count
        if moving > seconds:
            seconds = moving
            how = f"computed: {row['bytes_per_view'] / 1e6:.1f} MB a view at {OF_BANDWIDTH:.0%} of the bandwidth"
    return Row(device.name, work.views * seconds / 3600, row.get("examples"), row.get("memory"), how)


def on(name: str, e: Experiment, records: list[dict[str, Any]] | None = None) -> Row:
    """Returns the row of the device of this name, for a network of ImageNet's table at full size without tracing it."""
    network = e.network, e.depth, e.image_size
    (device,) = (device for device in DEVICES if device.name == name)
    return row_of(device, e, work_of(e, imagenet.FLOPS.get(network)), records or [])


def report(e: Experiment, results: str | pathlib.Path, number: int = 1) -> str:
    """Returns the plan as text, for `number` times each of `DEVICES`.

    Raises:
      ValueError: `number` is not positive, or `work_of` refuses.
    """
    from dpnb.results.store import load

    if number < 1:
        raise ValueError(f"the number of devices must be at least 1, got {number}")

    work, (parameters, _) = work_of(e), flops_of(e)
    way = "forward" if e.on_features else "forward and backward"
    lines = [
        f"{e.name} [{e.preset}]: {label(e)}, {parameters:,} parameters",
        f"{work.words}, {work.flops / 1e9:.3g} GFLOP each {way}: {work.views * work.flops:.3g} FLOP",
        "",
        f"{'device':<15} {'hours':>8}  {'a call':<26} how that is known",
    ]
    for row in rows(e, work, load(results)):
        row = row._replace(hours=row.hours / number, device=f"{number} x " * (number > 1) + row.device)
        call = f"{row.examples} examples, {row.memory / 1e9:.1f} GB" if row.examples else "-"
        hours = f"{row.hours:,.0f}" if row.hours >= 10 else f"{row.hours:.2g}"
        lines.append(f"{row.device:<15} {hours:>8}  {call:<26} {row.how}")
    lines += [
        "",
        f"{'That' if e.on_features else 'Updates'} alone: compilation, reading and evaluation come on top. What is computed was not",
        "measured. The shares of peak and bandwidth are those of WRN-16-4 on an H100, measured once (docs/performance.md).",
    ]
    lines += ["Several devices are assumed to share the views without loss."] * (number > 1)
    return "\n".join(lines)
