"""Small tables for notebooks: what `_repr_html_` of the results returns. No script, all escaped."""

from collections.abc import Iterable, Sequence
from html import escape


def html_table(
    caption: str, titles: Sequence[str], rows: Iterable[Sequence[object]], after: Iterable[str] = ()
) -> str:
    """Return a table under a caption, numbers to the right, and sentences below it.

    None stands as "-", and floats with three digits.
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    below = "".join(f"<p>{escape(sentence)}</p>" for sentence in after)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><p><b>{escape(caption)}</b></p>{table}{below}</div>"


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f'<td style="text-align: left">{escape(value)}</td>'
    text = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
    return f'<td style="text-align: right">{text}</td>'
