"""Pages of records: one per experiment, with its runs and their files, and the tables that link to them."""

import functools
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import charts
import pages

from dpnb import experiments, results
from dpnb.cli import TABLES
from dpnb.results.consistency import MALFORMED, changed, in_words

SHOWN = ("cifar10", "finetune", "imagenet")  # the tables of docs/results.md
FILES = ("result.json", "privacy.md", "curve.png")


class OnFile(NamedTuple):
    """A record, and its folder below the root of the repository."""

    record: dict[str, Any]
    folder: str

    @property
    def page(self) -> str:
        """The page of its experiment."""
        return page(self.record["experiment"])


def page(experiment: str) -> str:
    """Returns the page of an experiment's records."""
    return f"results/{experiment}.md"


def load() -> list[OnFile]:
    """Loads all records, each with its folder, in the order of the registry; they must be sound."""
    found = []
    for path in sorted((pages.ROOT / "results").rglob("result.json")):
        (record,) = results.load(path.parent)
        found.append(OnFile(record, path.parent.relative_to(pages.ROOT).as_posix()))
    order = {name: place for place, name in enumerate(experiments.names())}
    return sorted(found, key=lambda r: (order.get(r.record["experiment"], len(order)), r.folder))


def homes(on_file: list[OnFile]) -> dict[str, str]:
    """Returns the pages that stand for folders of records, {folder: page}."""
    return {
        **{str(pathlib.PurePath(r.folder).parent): r.page for r in on_file},
        **{r.folder: r.page for r in on_file},
    }


def linked_tables(on_file: list[OnFile]) -> dict[str, str]:
    """Returns the tables of docs/results.md in Markdown, where each row that has runs links to their page."""
    records, tables = [r.record for r in on_file], {}
    for name in SHOWN:
        frame = results.table(TABLES[name], records)
        frame["experiment"] = [
            f"[{row.experiment}](../{page(row.experiment)})" if row.n != "-" else row.experiment
            for row in frame.itertuples()
        ]
        tables[name] = results.markdown(frame).replace(" +- ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return tables


def write(site: pages.Site, on_file: list[OnFile]) -> None:
    """Writes a page for each experiment that has records, one that lists them all, and copies the files."""
    by_page: dict[str, list[OnFile]] = {}
    for r in on_file:
        by_page.setdefault(r.page, []).append(r)
    for name, runs in by_page.items():
        site.write(name, experiment_page(site, name, runs))
    counted = [
        f"| [{runs[0].record['experiment']}]({os.path.relpath(name, 'results')}) | "
        f"{', '.join(dict.fromkeys(r.record['preset'] for r in runs))} | {len(runs)} |"
        for name, runs in by_page.items()
    ]
    site.write(
        "results/index.md",
        "\n".join(
            [
                "# All records\n",
                f"{len(on_file)} runs of {len(by_page)} experiments are on record. Preset `paper` is the paper's "
                "experiment; smaller presets are other, smaller ones, and their numbers are not comparable "
                "([presets](../docs/reproduce.md#presets)). A study counts a run under each name that its settings have, "
                "here it stands once.\n",
                "| experiment | presets | runs |\n| --- | --- | --- |",
                *counted,
                "",
            ]
        ),
    )


def experiment_page(site: pages.Site, name: str, runs: list[OnFile]) -> str:
    """Returns the page of one experiment: its runs, their files, and the privacy statement of each."""
    first = runs[0].record
    registered = first["experiment"] in experiments.names()
    published = results.published(experiments.get(first["experiment"])) if registered else "-"
    said = "no number is published" if published == "-" else f"the published number is {published} %"
    text = [
        "---\norphan: true\n---\n",  # in no list at the side, which would be too long
        f"# {first['experiment']}\n",
        f"Data set {first['data']['name']}; {said}. Accuracy is in percent, of the averaged parameters (EMA) and of the "
        "last ones (raw).",
    ]
    if {r.record["preset"] for r in runs} != {"paper"} and published != "-":
        text.append("Runs below preset `paper` are smaller experiments: **not comparable** with that number.")
    columns = "preset | seed | record | EMA | raw | epsilon (PLD) | epsilon (RDP) | delta | sigma | sampler | updates | minutes"
    line = "| --- " * len(columns.split(" | ")) + "|"
    text += ["", f"| {columns} |", line, *(row(site, name, r) for r in runs), ""]
    if any(len(r.record["curve"]) > 1 for r in runs):
        text += ["## During training\n", f'<img class="figure" src="{curves(site, name, runs)}" width="620" '
                 'alt="test accuracy over the updates, one line per run" loading="lazy">\n']  # fmt: skip
    text += ["## In words\n", *(f"- {words(r.record)}" for r in runs)]
    statements: dict[str, list[str]] = {}
    for r in runs:
        statements.setdefault(statement(r.record), []).append(
            f"{r.record['preset']}, seed {r.record['seed']}"
        )
    for said, whose in statements.items():
        text += [
            "",
            f"## Privacy statement{' (' + '; '.join(whose) + ')' if len(statements) > 1 else ''}\n",
            said,
        ]
    return "\n".join(text) + "\n"


def statement(record: dict[str, Any]) -> str:
    """Returns the privacy statement of a record, as `dpnb.results.statement` does; equal ones are made once."""
    keys = ("ledger", "data", "pretrained")
    needed = {key: record.get(key) for key in keys} | {
        "privacy": {key: record["privacy"].get(key) for key in ("delta", "seed_published", "exact_noise")}
    }
    return _statement(json.dumps({k: v for k, v in needed.items() if v is not None}))


@functools.cache
def _statement(needed: str) -> str:
    record = json.loads(needed)
    record["privacy"]["exact_noise"] = bool(record["privacy"]["exact_noise"])
    return results.statement(record)


def row(site: pages.Site, name: str, r: OnFile) -> str:
    """Returns the row of a run."""
    p, accuracy, seconds, seed = (r.record[key] for key in ("privacy", "accuracy", "seconds", "seed"))
    cells = [
        r.record["preset"], "secret" if seed is None else str(seed), copied(site, name, r),
        f"{accuracy['ema']:.2f}", f"{accuracy['raw']:.2f}",
        *(f"{p[k]:.3f}" if p.get(k) is not None else "-" for k in ("epsilon_pld", "epsilon_rdp")),
        f"{p['delta']:g}", f"{p['noise_multiplier']:.4g}", p["sampler"], f"{p['steps']:,}",
        "-" if seconds is None else f"{seconds / 60:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def copied(site: pages.Site, name: str, r: OnFile) -> str:
    """Copies the files of a run to the site, and returns links to them."""
    links = []
    for file in FILES:
        if (pages.ROOT / r.folder / file).exists():
            place = site.files / r.folder / file
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pages.ROOT / r.folder / file, place)
            where = os.path.relpath(f"{r.folder}/{file}", pathlib.PurePath(name).parent)
            links.append(f'<a href="{where}">{file}</a>')
    return ", ".join(links)


def words(record: dict[str, Any]) -> str:
    """Returns a run in words: what it did, on which images, and what keeps it out of the tables, if anything."""
    text = [results.row(record).replace("[", "(").replace("]", ")") + "."]
    if record["data"]["note"]:
        text.append(f"Images: {record['data']['note']}.")
    try:
        different = in_words(changed(record))
    except MALFORMED:
        different = ""
    if different:
        text.append(f"**In no table**, as its settings were changed from the registry: {different}.")
    return " ".join(text)


def curves(site: pages.Site, name: str, runs: list[OnFile]) -> str:
    """Draws test accuracy over the updates, one line per run; returns the picture's path as the page sees it."""
    file = f"curves/{name.removesuffix('.md').removeprefix('results/')}.svg"
    with charts.style():
        figure = charts.over_updates({
            f"{r.record['preset']}, seed {r.record['seed']}": r.record["curve"]
            for r in runs if len(r.record["curve"]) > 1
        })  # fmt: skip
        (site.files / file).parent.mkdir(parents=True, exist_ok=True)
        charts.save(figure, site.files / file)
    return os.path.relpath(file, pathlib.PurePath(name).parent)
