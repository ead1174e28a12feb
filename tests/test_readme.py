"""README and docs: tables are those that the committed records give, files and links that are named exist."""

import pathlib
import re

import pytest

from dpnb import cli

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TABLES = {"readme": "README.md", **dict.fromkeys(("cifar10", "finetune", "imagenet"), "docs/results.md")}
FILE = re.compile(r"(?<![\w./~<-])(?:dpnb|notebooks|benchmarks|results|docs|tests)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_from_the_records(name, tmp_path):
    page, copy = ROOT / TABLES[name], tmp_path / "page.md"
    copy.write_text(page.read_text())
    assert cli.main(["table", name, "--results", str(ROOT / "results"), "--write", str(copy)]) == 0
    assert copy.read_text() == page.read_text(), f"renew it: dpnb table {name} --write {TABLES[name]}"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = FILE.findall(page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert links
    assert not [link for link in links if not (page.parent / link).exists()]
