"""The first page: one picture for each table and study, drawn from the records, and one sentence on what it shows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import charts
import numpy as np
import pages
from matplotlib.figure import Figure

from dpnb import plots, results, sweep
from dpnb.cli import TABLES

INTRODUCTION = """# dpnb at a glance

Notebooks that reproduce *Unlocking High-Accuracy Differentially Private Image Classification through Scale*
(De, Berrada, Hayes, Smith, Balle 2022, [arXiv 2204.13650](https://arxiv.org/abs/2204.13650)) on a thin library in JAX.
Every picture below is drawn from the records in the [repository](https://github.com/dpnb/dpnb); the link above it leads to
the notebook, as executed, with every number.

**How to read them.** Accuracy is on the test set, in percent, mean over n seeds; bars are standard deviations. Only preset
`paper` is the paper's experiment. Where a picture says *smaller scale*, our runs are small networks on two CPU cores: they
show what a technique does, and are **not comparable** with the paper's numbers. *Unverified*: a number of the paper that was
not checked against its PDF. [What a status means](docs/results.md), [how to make each number again](docs/reproduce.md).
"""
STUDIES = """The paper shows its studies as figures whose values are not public as numbers, so ours stand alone. Differences are
between means, ± their standard error; those of less than three standard errors show nothing.
"""
BASELINES = {"patch-linear": "patches learnt from random dead leaves", "scatter-linear": "scattering"}


class Card(NamedTuple):
    """A picture of the first page: its title, notebook, and what draws it and says what it shows."""

    title: str
    notebook: str
    draw: Callable[[list[dict[str, Any]]], tuple[Figure, str]]


def study(name: str, records, fields=()):
    """Returns the scale and the summary of a study, at the scale at which most of its cells have been run."""
    frames = sweep.on_record(f"cifar10/{name}/*", "paper", records, fields)
    return max(frames.items(), key=lambda pair: int((pair[1]["n"] > 0).sum()))


def smaller(scale: str) -> str:
    """Says at which scale runs are, for a title."""
    return "at the paper's scale" if "paper" in scale else f"smaller scale (preset {scale})"


def gain(frame, cell: str, other: str) -> str:
    """Says by how many points one cell differs from another, with the standard error and the number of runs."""
    d = results.difference(frame, cell, other)
    if not (d.n and d.n_other):
        return "not on record yet"
    error = f" ± {d.error:.1f}" if np.isfinite(d.error) else ""
    return f"{d.mean:+.1f}{error} points (n = {d.n} and {d.n_other})".replace("-", "−", 1)


def part(frame, *beginnings: str):
    """Returns the cells of a study whose names begin so."""
    return frame[frame["cell"].str.startswith(beginnings)].reset_index(drop=True)


def table(records):
    """Draws the table of CIFAR-10 from scratch."""
    frame = results.table(TABLES["cifar10"], records)
    figure = charts.against_epsilon(frame, "CIFAR-10 without other photographs, delta = 1e-5")
    full = frame[(frame["n"] != "-") & (frame["preset"] == "paper") & frame["epsilon"].isin((1, 3, 8))]
    reached = "; ".join(
        f"on {what} "
        + ", ".join(f"{r.ours} % at epsilon {r.epsilon:g} (n = {r.n})" for r in rows.itertuples())
        for name, what in BASELINES.items()
        if len(rows := full[full["experiment"].str.startswith(f"cifar10/{name}/")])
    )
    return figure, (
        f"Linear layers on fixed features, trained at full scale: {reached or 'no number yet'}. "
        "Of the paper's own networks only smaller ones have been run."
    ).replace("+-", "±")


def finetuning(records):
    """Draws the table of fine-tuning on CIFAR-10 at epsilon 1, where all ways are on record."""
    frame = results.table("cifar10/finetune/*", records)
    ran = frame[frame["n"] != "-"].reset_index(drop=True)
    figure = charts.beside(
        ran, "cifar10/finetune/", f"CIFAR-10, ours: {smaller(', '.join(dict.fromkeys(ran['preset'])))}"
    )
    small = sweep.on_record("cifar10/finetune/*", "teach", records)["teach"]
    return figure, (
        "Beginning with public photographs, and training the classifier alone, changes the small network's accuracy at "
        f"epsilon 1 by {gain(small, 'classifier/eps1', 'scratch/eps1')} against beginning from scratch."
    )


def textures(records):
    """Draws what random images are worth in place of photographs."""
    frame = sweep.on_record("cifar10/finetune/*", "teach", records)["teach"]
    order = ["scratch/eps1", "textures-classifier/eps1", "textures-all/eps1", "all/eps1", "classifier/eps1"]
    shown = frame.set_index("cell").loc[order].reset_index()
    figure = plots.bars(shown, f"Epsilon 1, {smaller('teach')}")
    return charts.fitted(figure), (
        "Images of random processes instead of photographs, all layers trained: "
        f"{gain(frame, 'textures-all/eps1', 'scratch/eps1')} against beginning from scratch."
    )


def imagenet(records):
    """Draws the table of ImageNet and Places-365."""
    frame = results.table(TABLES["imagenet"], records)
    figure = charts.published(frame, "ImageNet and Places-365: the paper's numbers")
    runs = int(sum(n for n in frame["n"] if n != "-"))
    impossible = int(frame["status"].str.startswith("impossible").sum())
    ours = f"{runs} runs of ours are at this scale" if runs else "No run of ours is at this scale yet"
    return figure, (
        f"{ours}. {impossible} of these {len(frame)} numbers nobody outside can try, since the network saw photographs "
        "that were never released."
    )


def ablation(records):
    """Draws the ladder of techniques."""
    scale, frame = study("ablation", records)
    figure = plots.bars(part(frame, *"0123456789"), f"Epsilon 8, {smaller(scale)}")
    return charts.fitted(figure), (
        f"The whole recipe against the network without normalisation: {gain(frame, '5-ema', '0-no-norm')}; without "
        f"clipping and noise the same network gains another {gain(frame, 'private-none', '5-ema')}."
    )


def augmult(records):
    """Draws augmentation multiplicity."""
    scale, frame = study("augmult", records)
    figure = plots.lines(
        {f"preset {scale}": frame}, "K", "K, views per image (0: the plain image)",
        f"Epsilon 8, {smaller(scale)}", spacing="equal",
    )  # fmt: skip
    return charts.fitted(figure), f"Eight views inside the clip instead of one: {gain(frame, 'k8', 'k1')}."


def batch(records):
    """Draws batch size and number of updates, by the images drawn."""
    scale, frame = study("batch", records)
    frame["images"] = frame["B"] * frame["T"] / 1000
    ways = {
        "varying B": frame[frame["cell"].str.fullmatch(r"b\d+")],
        "varying T": frame[frame["cell"].str.fullmatch(r"t\d+")],
    }
    figure = plots.lines(
        ways,
        "images",
        "images drawn, B x T (thousands)",
        f"Epsilon 8, {smaller(scale)}",
        ticks=False,
    )
    return charts.fitted(figure), (
        f"A batch sixteen times as large at the same epsilon: {gain(frame, 'b4096', 'b256')}; sixteen times as many "
        f"updates: {gain(frame, 't2500', 't156')}."
    )


def depth(records):
    """Draws depth."""
    scale, frame = study("depth-width", records, ("depth", "width"))
    figure = plots.lines(
        {f"preset {scale}": part(frame, "d")},
        "depth",
        "depth (layers)",
        f"Epsilon 8, {smaller(scale)}",
        spacing="linear",
    )
    return charts.fitted(figure, 3.8), f"WRN-16 instead of WRN-10: {gain(frame, 'd16', 'd10')}."


def width(records):
    """Draws width."""
    scale, frame = study("depth-width", records, ("depth", "width"))
    figure = plots.lines(
        {f"preset {scale}": part(frame, "w")}, "width", "widening factor", f"Epsilon 8, {smaller(scale)}"
    )
    return charts.fitted(figure, 3.8), f"Four times as wide: {gain(frame, 'w4', 'w1')}."


def lr_clip(records):
    """Draws learning rate and clipping norm."""
    scale, frame = study("lr-clip", records, ("learning_rate", "clip_norm"))
    figure = plots.grid(frame, "learning_rate", "clip_norm", f"Epsilon 8, {smaller(scale)}")
    return charts.fitted(figure, 4.4), (
        f"Small clipping norms matter little (C = 0.1 instead of 1 at learning rate 2: {gain(frame, 'lr2-c0.1', 'lr2-c1')}), "
        f"large ones hurt (C = 10: {gain(frame, 'lr2-c10', 'lr2-c1')})."
    )


TABLE_CARDS = (
    Card("CIFAR-10 from scratch", "cifar10_table", table),
    Card("Fine-tuning from public images", "cifar_finetune", finetuning),
    Card("No photographs at all", "cifar_no_public_images", textures),
    Card("ImageNet and Places-365", "imagenet_finetune", imagenet),
)
STUDY_CARDS = (
    Card("What each technique is worth", "cifar10_ablation", ablation),
    Card("Augmentation multiplicity", "cifar10_augmult", augmult),
    Card("Batch size, noise, updates", "cifar10_batch_noise_steps", batch),
    Card("Depth", "cifar10_depth_width", depth),
    Card("Width", "cifar10_depth_width", width),
    Card("Learning rate and clipping norm", "cifar10_lr_clip", lr_clip),
)


def write(site: pages.Site, on_file, notebooks: list[str]) -> None:
    """Writes the first page, its pictures, and the list of all pages beside it."""
    records = [r.record for r in on_file]
    (site.source / "glance").mkdir()
    parts = [INTRODUCTION]
    with charts.style():
        for title, said, cards in (("Tables", "", TABLE_CARDS), ("Studies", STUDIES, STUDY_CARDS)):
            parts += [f"## {title}\n", said, "::::{container} glance"]
            parts += [card_of(site, card, records) for card in cards]
            parts.append("::::\n")
    parts.append(contents(notebooks))
    site.write("index.md", "\n".join(parts))


def card_of(site: pages.Site, card: Card, records) -> str:
    """Draws the picture of a card, and returns its Markdown."""
    figure, sentence = card.draw(records)
    name = f"notebooks/{card.notebook}.ipynb"
    link = site.link("index.md", name) if name in site.pages else "docs/results.md"
    file = f"glance/{card.draw.__name__}.svg"
    charts.save(figure, site.source / file)
    return f":::{{container}} card-of\n### [{card.title}]({link})\n\n![{card.title}]({file})\n\n{sentence}\n\n:::"


def contents(notebooks: list[str]) -> str:
    """Returns the list of all pages, which the side of each page shows."""
    lectures = [name for name in notebooks if "/learn/" in name or name.endswith("/demo.ipynb")]
    documents = sorted(path.name for path in (pages.ROOT / "docs").glob("*.md"))
    listed = {
        "Results": ["docs/results.md", "results/index.md"],
        "Lectures": ["notebooks/learn/README.md", *lectures],
        "Studies": [name for name in notebooks if name not in lectures],
        "Documentation": [f"docs/{name}" for name in documents if name != "results.md"],
        "Programming interface": ["api/index.rst"],
    }
    return "\n".join(
        "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *names, "```\n"])
        for caption, names in listed.items()
        if names
    )
