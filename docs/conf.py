"""Sphinx builds these pages: sphinx-build -W --keep-going docs build/docs."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import fastplastic

sys.path.insert(0, str(Path(__file__).parent))
import generated

project = "fastplastic"
author = "fastplastic contributors"
project_copyright = author
version = release = fastplastic.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["__pycache__"]
myst_heading_anchors = 3
# Options keep their two dashes.
smartquotes = False
html_theme = "furo"
html_title = f"fastplastic {version}"
html_show_copyright = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
# Frameworks that need not be there for their callbacks to be described.
autodoc_mock_imports = ["lightning", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes are described once: in the docstring of their class.
napoleon_use_ivar = True
# Docstrings mark code by single backquotes.
default_role = "code"


# Pages of this repository that are not in this folder, and the pages that include them.
ELSEWHERE = {
    "../benchmarks/README.md": "/figures/speed.md",
    "../benchmarks/transfer/README.md": "/figures/transfer.md",
    "../benchmarks/continual/README.md": "/figures/continual.md",
}


def fill(app: Sphinx, name: str, source: list[str]) -> None:
    """Put what is made from the code in the place of its mark, and mend links."""
    for mark, make in generated.PARTS.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())
    for link, page in ELSEWHERE.items():
        source[0] = re.sub(rf"\]\((\.\./)*{re.escape(link)}", f"]({page}", source[0])


def to_rst(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Make RST of a docstring before napoleon reads its sections."""
    lines[:] = generated.as_rst(lines)


def setup(app: Sphinx) -> None:
    """Register what changes sources on their way."""
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", to_rst, priority=100)
