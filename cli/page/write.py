"""From the values of a page to its text, and to the file."""

import base64
import hashlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastplastic.cli import wiring_words
from fastplastic.cli.page import charts, tracks
from fastplastic.cli.page.changes import ChangesView
from fastplastic.cli.page.view import HEAT, PageView
from fastplastic.cli.render import count, magnitude, percent
from fastplastic.errors import InputError


def require_jinja2() -> None:
    """Raise InputError where jinja2 is not installed."""
    if find_spec("jinja2") is None:
        raise InputError("--html needs jinja2: pip install 'fastplastic[report]', or leave it out")


def page_text(view: PageView | ChangesView) -> str:
    """Return the page, every text of the view escaped.

    Style and script are the only ones that a browser takes: the page's policy names their digests.

    Raises:
        InputError: jinja2 is not installed.
    """
    require_jinja2()
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": count, "percent": percent, "magnitude": magnitude, "shortened": charts.shortened,
        "breakable": _breakable,
    }  # fmt: skip
    style, script = _part("page.css"), _part("page.js")
    template, values = _template(view)
    return environment.get_template(template).render(
        view=view, style=Markup(style), script=Markup(script),
        style_digest=_source_digest(style), script_digest=_source_digest(script), **values,
    )  # fmt: skip


def _template(view: PageView | ChangesView) -> tuple[str, dict[str, Any]]:
    """Return which template shows a view, and what it needs beside it."""
    if isinstance(view, ChangesView):
        return "compare.html", {"frame": tracks.TrackFrame()}
    return "profile.html", {
        "heat_titles": HEAT,
        "words": wiring_words,
        "chart": charts.HistogramFrame(view.report.tau),
        "diagram": charts.DiagramFrame(view.names),
    }


def write_page(view: PageView | ChangesView, path: Path, *, force: bool) -> None:
    """Write the page to a file.

    Raises:
        InputError: jinja2 is not installed.
        FileError: The file exists or cannot be written.
    """
    from fastplastic.files import atomic_write

    text = page_text(view)
    with atomic_write(path, force) as temporary:
        # Names of files need not be text: what is not stands as a question mark.
        temporary.write_bytes(text.encode("utf-8", "replace"))


def _breakable(name: str) -> str:
    """Return the name of a layer as HTML that a browser breaks behind dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source_digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
