"""Pages of `profile --html` and `compare --html`: a file to read and pass on, without network."""

from fastplastic.cli.page.changes import ChangesView, changes_view
from fastplastic.cli.page.digest import DataDigest
from fastplastic.cli.page.origin import Origin
from fastplastic.cli.page.view import Finding, PageView, page_view
from fastplastic.cli.page.write import page_text, require_jinja2, write_page

__all__ = [
    "ChangesView", "DataDigest", "Finding", "Origin", "PageView", "changes_view", "page_text",
    "page_view", "require_jinja2", "write_page",
]  # fmt: skip
