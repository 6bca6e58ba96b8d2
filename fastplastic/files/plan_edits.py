"""What somebody changed in a plan by hand, as far as it can be seen."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from fastplastic.files.fields import Check, Fields, integer, shown

_SHOWN = 3
_COUNT = integer(0)
_COUNT_OR_NULL = Check("null or a count", lambda value: value is None or _COUNT.fits(value))
_OF_PLAN = (
    "kind", "schema_version", "fastplastic_version", "fingerprint", "count", "beyond", "eligible",
    "notes", "wiring",
)  # fmt: skip
_OF_LAYER = ("name", "units", "scores", "shape", "selected")


def notes_of_edits(values: Fields, request: Collection[str], count: int) -> tuple[str, ...]:
    """Return what to say of keys that nobody reads, and of a count that is not that of the layers.

    Args:
        values: The plan, whose other fields were checked.
        request: Keys of what was asked for.
        count: Units or weights in its layers.

    Raises:
        FileError: The count is none at all.
    """
    notes = []
    entries = "masks" if values.values["granularity"] == "weight" else "layers"
    known = (*_OF_PLAN, *request, entries)
    unknown = [shown(key) for key in values.values if key not in known]
    unknown += _of_entries(values.values[entries])
    if unknown:
        more = ", ..." * (len(unknown) > _SHOWN)
        notes.append(f"the plan has keys that are not read: {', '.join(unknown[:_SHOWN])}{more}")
    if "beyond" in values.values:
        values.get("beyond", _COUNT_OR_NULL)
    if "count" in values.values and values.get("count", _COUNT) != count:
        found = shown(values.values["count"])
        notes.append(f"the plan says count {found}, its layers have {count}: those are taken")
    return tuple(notes)


def _of_entries(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for name in sorted(entry.keys() - {*_OF_LAYER}):
            yield f"{shown(name)} of {shown(entry['name'])}"
