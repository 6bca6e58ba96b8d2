"""The page of `profile --html`: one file to read and to pass on, without a network."""

from fastplastic.cli.page.digest import DataDigest
from fastplastic.cli.page.origin import Origin
from fastplastic.cli.page.view import Finding, PageView, page_view
from fastplastic.cli.page.write import page_text, require_jinja2, write_page

__all__ = [
    "DataDigest", "Finding", "Origin", "PageView", "page_text", "page_view", "require_jinja2",
    "write_page",
]  # fmt: skip
