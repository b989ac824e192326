"""Sphinx's settings for the book: `tox -e docs`.

The pages on the API, the settings and the commands have no text of their own: `generated` makes it while the book is
built, from the docstrings, the schemas and the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generated  # noqa: E402

import coriolis_azure  # noqa: E402

project = "coriolis-azure"
release = version = coriolis_azure.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"coriolis-azure {release}"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_copy_source = html_show_sourcelink = False
html_show_copyright = html_use_index = False
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
smartquotes = False  # two hyphens are an option's
default_role = "code"  # docstrings put code between single backticks
add_module_names = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
nitpicky = True
# A signature also names types of Python, of SDKs, and of ours that are no part of the API: they have no page here.
nitpick_ignore_regex = [("py:.*", ".*")]


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put in the text that is generated."""
    del app
    if page in generated.PAGES:
        source[0] += "\n" + generated.PAGES[page]()


def docstring(app: Any, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with indented code: make that what Sphinx reads."""
    del app, what, name, described, options
    lines[:] = generated.restructured(lines)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", docstring)
