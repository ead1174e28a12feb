"""Gathers the documents and the executed notebooks, with links that hold on the site."""

import base64
import json
import os
import pathlib
import posixpath
import re
import shutil
import struct
from typing import Any

from dpnb import folders

ROOT = folders.ROOT
EXECUTED = ROOT / "results/notebooks"
GITHUB = "https://github.com/dpnb/dpnb"
LINK = re.compile(r"(?<=\]\()(?P<target>[^()\s#]+)?(?P<anchor>#[^()\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
BADGE = re.compile(r"\[!\[[^\]]*\]\(https://colab[^)]*\)\]\((?P<target>[^)]+)\)")
# Pages of wide tables, and of pictures beside each other, have no list of their parts at the right.
WIDE = ("index.md", "docs/results.md", "results/")
NO_LIST = "html_theme.sidebar_secondary.remove: true\n"
# What input cells with a tag become: folded alone, or with what they print.
FOLDED = {"colab": "hide-input", "solution": "hide-cell"}


class Site:
    """The folder of pages, and where a file of the repository is found on the site.

    Args:
      source: the folder, of the shape of the repository.
      homes: pages of folders that have one of another name, by paths below the root of the repository.
    """

    def __init__(self, source: pathlib.Path, homes: dict[str, str]):
        self.source, self.files = source, source / "files"
        documents = {path.relative_to(ROOT).as_posix() for path in documents_of_the_repository()}
        notebooks = {f"notebooks/{name}" for name in executed()}
        self.pages = {**{name: name for name in documents | notebooks}, **homes}

    def link(self, page: str, target: str, anchor: str = "") -> str:
        """Returns the link that stands on the site for a relative one of a page of the repository.

        It is that of the site's page if there is one, else that of GitHub. A file that is nowhere stays as it is
        named, so that Sphinx warns.
        """
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        if path in self.pages:
            anchor = anchor.lower() if path.endswith(".ipynb") else anchor  # as Jupyter writes it
            return posixpath.relpath(self.pages[path], posixpath.dirname(page)) + anchor
        if path.startswith("docs/images/") or not (ROOT / path).exists():
            return target + anchor
        return f"{GITHUB}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{anchor}"

    def links(self, page: str, text: str) -> str:
        """Rewrites all links of Markdown text that lies at `page` in the repository; code stays as it is."""

        def renew(match: re.Match) -> str:
            target, anchor = match["target"] or "", match["anchor"] or ""
            if not target or "://" in target or target.startswith("mailto:"):
                return target + anchor
            return self.link(page, target, anchor)

        text = BADGE.sub(r"[Open in Colab](\g<target>){.colab}", text)
        parts = FENCE.split(text)  # every second one is code
        return "".join(part if i % 2 else LINK.sub(renew, part) for i, part in enumerate(parts))

    def write(self, page: str, text: str) -> None:
        """Writes a page into the folder."""
        path = self.source / page
        path.parent.mkdir(parents=True, exist_ok=True)
        if page.startswith(WIDE):
            text = text if text.startswith("---\n") else f"---\n---\n{text}"
            text = text.replace("---\n", f"---\n{NO_LIST}", 1)
        path.write_text(text)


def documents_of_the_repository() -> list[pathlib.Path]:
    """Returns the documents that have a page: those of docs/, and the one for who learns or teaches."""
    return [*sorted((ROOT / "docs").glob("*.md")), ROOT / "notebooks/learn/README.md"]


def executed() -> list[str]:
    """Returns the executed notebooks by their paths below `results/notebooks`: lectures by number, then the others.

    The others are in the order of docs/notebooks.md, and what it does not name comes last.
    """
    found = [path.relative_to(EXECUTED).as_posix() for path in sorted(EXECUTED.rglob("*.ipynb"))]
    text = (ROOT / "docs/notebooks.md").read_text()
    return sorted(found, key=lambda name: (text.find(f"notebooks/{name}") % (len(text) + 1), name))


def write_documents(site: Site, tables: dict[str, str]) -> None:
    """Writes the pages of the documents; between the markers of docs/results.md stand the given tables."""
    for path in documents_of_the_repository():
        page = path.relative_to(ROOT).as_posix()
        text = site.links(page, path.read_text())
        if path.stem == "results":
            for name, table in tables.items():
                marked = re.compile(f"<!-- table {name} -->.*?<!-- end -->", re.DOTALL)
                text = marked.sub(lambda _, table=table: table, text)
        site.write(page, text)
    shutil.copytree(ROOT / "docs/images", site.source / "docs/images")


def write_notebooks(site: Site) -> list[str]:
    """Writes the executed notebooks where the notebooks themselves lie; returns their pages."""
    written = [f"notebooks/{name}" for name in executed()]
    for page, name in zip(written, executed(), strict=True):
        notebook = json.loads((EXECUTED / name).read_text())
        notebook["metadata"].pop("widgets", None)
        pictures = 0
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            cell["source"] = site.links(page, text) if cell["cell_type"] == "markdown" else text
            fold(cell)
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                if "text/markdown" in data:
                    data["text/markdown"] = site.links(page, "".join(data["text/markdown"]))
                if "image/png" in data:
                    pictures += 1
                    picture(site, page, pictures, output)
        site.write(page, json.dumps(notebook))
    return written


def fold(cell: dict[str, Any]) -> None:
    """Tags a cell that is folded in Jupyter, or that is of no use on a page, so that it is folded on the site."""
    metadata = cell["metadata"]
    tags = metadata.setdefault("tags", [])
    tags += [FOLDED[tag] for tag in list(tags) if tag in FOLDED]
    if metadata.get("jupyter", {}).get("source_hidden") and not {*FOLDED.values()}.intersection(tags):
        tags.append("hide-input")


def picture(site: Site, page: str, number: int, output: dict[str, Any]) -> None:
    """Puts a picture of a notebook into a file, and in its place HTML that shows it as large as it was shown there."""
    png = base64.b64decode("".join(output["data"].pop("image/png")))
    size = struct.unpack(">II", png[16:24])
    said = output.get("metadata", {}).get("image/png", {})
    width = int(said.get("width", size[0]))
    file = f"pictures/{page.removesuffix('.ipynb')}-{number}.png"
    path = site.files / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png)
    where = os.path.relpath(file, posixpath.dirname(page))
    output["data"] = {
        "text/html": f'<img class="figure" src="{where}" width="{width}" height="{round(size[1] * width / size[0])}" '
        f'alt="figure {number} of this notebook" loading="lazy">'
    }
    output["metadata"] = {}
