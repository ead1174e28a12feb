"""The README's result table is the one that the committed records give."""

import pathlib

import pytest

from dpnb import cli, results

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["cifar10", "finetune", "imagenet"])
def test_result_tables_come_from_the_records(name):
    document = (ROOT / "README.md").read_text()
    table = results.table(cli.TABLES[name], results.load(ROOT / "results"))
    fresh = results.insert(document, name, table)
    assert fresh == document, f"renew it: dpnb table {name} --write README.md"


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = [
        word for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split() if "/" in word
    ]
    files = [
        w.strip(",.;:") for w in named if w.startswith(("dpnb/", "notebooks/", "benchmarks/", "results/"))
    ]
    assert len(files) > 8
    missing = [f for f in files if not (ROOT / f).exists()]
    assert not missing
