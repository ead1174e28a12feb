"""Settings of Sphinx for the site that build.py makes; see there."""

import pathlib
import shutil
from importlib.util import find_spec

import api

from dpnb import folders

project = "dpnb"
author = copyright = "The dpnb authors"
version = release = folders.version()
html_title = "dpnb"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["files", "static"]
root_doc = "index"
default_role = "code"

# Notebooks are shown as they were executed.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_mime_priority_overrides = [("html", "text/markdown", 0)]
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a notebook may begin a part with any level of heading

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_theme_options = {
    "repository_url": "https://github.com/dpnb/dpnb",
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_source_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search is at the side
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
html_context = {"default_mode": "auto"}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["files"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False
html_domain_indices = False
html_sourcelink_suffix = ""

# MathJax comes from a package, and of it only what pages load: the fonts lie beside the program.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {
    "options": {"enableMenu": False},
    "chtml": {"displayAlign": "left", "displayIndent": "2em"},
}
MATHJAX = pathlib.Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"


def copy_mathjax(app) -> None:
    """Puts MathJax among the static files of the site."""
    fonts = "output/chtml/fonts/woff-v2"
    static = app.srcdir / "static/mathjax"
    shutil.copytree(MATHJAX / fonts, static / fonts, dirs_exist_ok=True)
    shutil.copy(MATHJAX / "tex-chtml.js", static)


def setup(app) -> None:
    """Connects what the settings above do not say."""
    app.connect("builder-inited", copy_mathjax)
    app.connect("autodoc-process-docstring", api.as_restructured_text, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", api.skip)
