"""Settings of Sphinx for `make docs`. They also write the page of all methods, before Sphinx reads the sources."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import methods_page  # noqa: E402

import ntkbench  # noqa: E402

(FOLDER / "methods.md").write_text(methods_page.page(), encoding="utf-8")

project, author = "ntkbench", "The ntkbench developers"
copyright = f"2026, {author}"
release = ntkbench.__version__

# The last extension bundles MathJax, so that pages load nothing from elsewhere.
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
mathjax3_config = {"options": {"enableMenu": False}}  # its speech components would be loaded from elsewhere
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what arguments are
napoleon_use_rtype = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "ntkbench"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
