"""The documentation site: it is built without warnings, all that a page names is there, and nothing comes from elsewhere."""

import html.parser
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse
from importlib.util import find_spec
from typing import NamedTuple

import pytest
from shared_runs import ROOT

from dpnb import experiments, results
from dpnb.cli import TABLES

NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::dpnb.results.LeftOut"),
    pytest.mark.skipif(bool(MISSING), reason=f"the extra `site` is not installed: {', '.join(MISSING)}"),
]
NOT_LOADED = {"a", "form"}  # what they name is opened by a click only
ATTRIBUTES = ("href", "src", "data", "action", "poster")


class Page(NamedTuple):
    """What a page of the site has: text, anchors, and (element, address) of all that it names."""

    text: str
    anchors: set[str]
    named: list[tuple[str, str]]


class Reader(html.parser.HTMLParser):
    """Collects what a page names."""

    def __init__(self, text: str):
        super().__init__()
        self.page = Page(text, set(), [])
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.page.anchors.update(found[key] for key in ("id", "name") if found.get(key))
        self.page.named.extend((tag, found[key]) for key in ATTRIBUTES if found.get(key))
        self.page.named.extend(
            (tag, part.split()[0]) for part in (found.get("srcset") or "").split(",") if part.strip()
        )


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> pathlib.Path:
    """The folder of the site, built once; any warning of Sphinx is an error."""
    out = tmp_path_factory.mktemp("site") / "site"
    keep = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    built = subprocess.run(
        [sys.executable, ROOT / "docs/site/build.py", out], cwd=ROOT, env=keep, capture_output=True, text=True
    )
    assert built.returncode == 0 and not built.stderr, built.stdout + built.stderr
    return out


@pytest.fixture(scope="session")
def pages(site) -> dict[str, Page]:
    """All pages, by their paths below the folder of the site."""
    return {path.relative_to(site).as_posix(): Reader(path.read_text()).page for path in site.rglob("*.html")}


def local(address: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:|//", address)


def test_links_and_their_anchors_resolve(site, pages):
    broken = []
    for name, page in pages.items():
        for _, address in page.named:
            if not local(address):
                continue
            path, _, anchor = address.partition("#")
            target = (site / name).parent / urllib.parse.unquote(path.split("?")[0]) if path else site / name
            target = target.resolve()
            if not target.is_file():
                broken.append((name, address))
            elif anchor and target.suffix == ".html":
                known = pages[target.relative_to(site.resolve()).as_posix()].anchors
                if urllib.parse.unquote(anchor) not in known:
                    broken.append((name, address))
    assert not broken


def test_links_to_the_repository_name_what_is_in_it(pages):
    """Those that leave the site for a file of ours."""
    ours = re.compile(r"https://github\.com/dpnb/dpnb/(blob|tree)/main/([^#?]+)")
    found = {m.groups() for page in pages.values() for _, a in page.named if (m := ours.match(a))}
    assert found
    check = {"blob": pathlib.Path.is_file, "tree": pathlib.Path.is_dir}
    assert not [(kind, path) for kind, path in found if not check[kind](ROOT / urllib.parse.unquote(path))]


def test_nothing_is_loaded_from_elsewhere(site, pages):
    links = [
        (name, tag, address)
        for name, page in pages.items()
        for tag, address in page.named
        if tag not in NOT_LOADED and not local(address) and not address.startswith("data:")
    ]
    assert not links
    styles = [path for path in site.rglob("*.css")]
    assert styles
    for path in styles:
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", path.read_text())
        assert not [
            a for pair in addresses for a in pair if a and not local(a) and not a.startswith("data:")
        ], path


def test_every_document_and_executed_notebook_has_a_page(pages):
    documents = {f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    documents.add("notebooks/learn/README.html")
    executed = ROOT / "results/notebooks"
    notebooks = {
        f"notebooks/{path.relative_to(executed).with_suffix('.html')}" for path in executed.rglob("*.ipynb")
    }
    assert documents and notebooks and documents | notebooks < pages.keys()
    listed = {address.split("#")[0] for _, address in pages["index.html"].named}
    assert documents | notebooks <= listed, "each is in the list at the side"


@pytest.mark.parametrize("name", ["cifar10", "finetune", "imagenet"])
def test_rows_with_runs_lead_to_their_records(name, site, pages):
    records = results.load(ROOT / "results")
    page = pages["docs/results.html"]
    addresses = {address for _, address in page.named}
    for row in results.table(TABLES[name], records).itertuples():
        target = f"results/{row.experiment}.html"
        assert row.experiment in page.text
        if row.n == "-":
            continue
        assert f"../{target}" in addresses
        runs = results.runs_of_cell(row.experiment, row.preset, records)
        shown = pages[target]
        assert len([a for _, a in shown.named if a.endswith("result.json")]) >= len(runs) == row.n
        for run in runs:
            assert f"{run['accuracy']['ema']:.2f}" in shown.text and run["privacy"]["sampler"] in shown.text
        assert "neighbouring relation" in shown.text, "its privacy statement"


def test_all_records_are_copied_as_they_are(site):
    found = [path for path in (ROOT / "results").rglob("result.json")]
    assert len(found) >= len(results.load(ROOT / "results"))
    for path in found:
        assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_formulas_are_typeset_by_what_the_site_brings(site, pages):
    """A page with a formula loads MathJax from the site, fonts included, and no formula was left as text."""
    with_formulas = {name: page for name, page in pages.items() if 'class="math ' in page.text}
    assert len([name for name in with_formulas if name.startswith("notebooks/")]) > 5
    for name, page in with_formulas.items():
        scripts = [address for tag, address in page.named if tag == "script" and "mathjax" in address.lower()]
        assert scripts and all(map(local, scripts)), name
        outside = re.sub(
            r'<(span|div) class="math .*?</\1>|<pre>.*?</pre>|<code .*?</code>', "", page.text, flags=re.S
        )
        assert not re.search(r"\$\$|\\(frac|varepsilon|sigma|mathrm|lVert)\b", outside), name
    assert len(list((site / "_static/mathjax").rglob("*.woff"))) > 20


def test_the_first_page_shows_a_picture_for_each_study(site, pages):
    page = pages["index.html"]
    pictures = [address for tag, address in page.named if tag == "img" and address.endswith(".svg")]
    assert len(pictures) == len({*pictures}) >= 9
    for study in experiments.studies.STUDIES.values():
        assert f"notebooks/{study.replace('.ipynb', '.html')}" in {address for _, address in page.named}
    assert "not comparable" in page.text and "n = " in page.text


def test_public_names_are_documented(pages):
    import importlib

    for package in ("privacy", "gradients", "data", "models", "experiments", "training", "results"):
        module = importlib.import_module(f"dpnb.{package}")
        page = pages[f"api/dpnb.{package}.html"]
        assert not [n for n in module.__all__ if f"dpnb.{package}.{n}" not in page.anchors]
