"""Builds the static documentation site from what is committed: nothing is executed, and no network is needed.

    python docs/site/build.py site

Pages are gathered in a temporary folder that has the shape of the repository, so that relative links between them hold
as they are; Sphinx makes HTML of it. A warning of Sphinx ends the build with status 1.
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import warnings

import api
import glance
import pages
import records
from sphinx.cmd.build import main as sphinx

from dpnb.results import LeftOut

HERE = pathlib.Path(__file__).parent


def gather(source: pathlib.Path) -> None:
    """Writes all pages into the folder `source`, and the files that they show into its folder `files`."""
    shutil.copytree(HERE / "static", source / "static")
    shutil.copy(HERE / "conf.py", source)
    on_file = records.load()
    site = pages.Site(source, records.homes(on_file))
    pages.write_documents(site, records.linked_tables(on_file))
    notebooks = pages.write_notebooks(site)
    records.write(site, on_file)
    api.write(source)
    glance.write(site, on_file, notebooks)


def main() -> int:
    """Builds the site; returns the exit status of Sphinx."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path, help="folder of the site; what it holds is replaced")
    out = parser.parse_args().out.absolute()
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").exists():
        parser.error(f"out must be a new folder or an earlier site, got {out}")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "source")
        with warnings.catch_warnings(
            action="ignore", category=LeftOut
        ):  # records in no table say why on their page
            gather(source)
        made = pathlib.Path(folder, "html")
        status = sphinx(
            ["-q", "-W", "--keep-going", "-b", "html", "-d", f"{folder}/doctrees", str(source), str(made)]
        )
        if not status:
            for template in (made / "_static").glob("*.html"):  # of the theme, no page
                template.unlink()
            (made / ".nojekyll").touch()  # GitHub Pages then serves folders that begin with an underscore
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(made, out)
    return status


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["MPLBACKEND"] = "agg"
    sys.exit(main())
