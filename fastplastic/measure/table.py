"""The layers of a profile as a flat table: for files of comma-separated values and for pandas."""

from collections.abc import Iterable, Mapping
from typing import Any


def flat_rows(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each layer of the JSON schema, all with the same columns in one order.

    Names of tied modules and reasons are one text; ranks have a column each, such as
    "ranks.srank". What a layer does not have is None.
    """
    rows = [_flat(layer) for layer in layers]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _flat(layer: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in layer.items():
        if name == "ranks":
            row |= {f"ranks.{rank}": number for rank, number in value.items()}
        elif name == "unknown":
            row[name] = "; ".join(f"{reason} ({number})" for reason, number in value.items())
        else:
            row[name] = "; ".join(value) if name == "tied" else value
    return row
