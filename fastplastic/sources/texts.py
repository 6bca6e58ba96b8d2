"""Texts from a file: one a line, or JSON lines with a text and perhaps a label."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastplastic.errors import FileError, InputError

_JSON_LINES = (".jsonl", ".ndjson", ".json")
# Fields that are looked for, in this order.
_TEXT, _LABEL = ("text", "sentence", "content"), ("label", "labels")
TEXT_FORMS = (
    "expected a text file with one text a line, or a .jsonl file with lines such as "
    '{"text": "...", "label": 0}'
)


@dataclass(frozen=True)
class TextLine:
    """A text and where it stands.

    Attributes:
        place: File and line, for errors.
        text: The text, which is not empty.
        label: A number or a name of a class, or None.
    """

    place: str
    text: str
    label: int | str | None = None


def read_texts(spec: str) -> list[TextLine]:
    """Return the texts in a file; lines that are empty are left out.

    Raises:
        InputError: It is no file of texts but a name of images.
        FileError: It is missing, empty or not text, or a line has another form.
    """
    path = Path(spec)
    if not path.is_file():
        if path.is_dir():
            raise FileError(f"{spec}: is a folder, {TEXT_FORMS}: name the file")
        raise FileError(f"{spec}: no such file, {TEXT_FORMS}: check the path")
    content = _content(path)
    lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if path.suffix.lower() in _JSON_LINES:
        found = list(_objects(path, lines))
    else:
        found = [TextLine(f"{path}:{number}", line.strip()) for number, line in lines]
    if not found:
        raise FileError(f"{path}: holds no text, {TEXT_FORMS}: check the file")
    _check_labels(path, found)
    return found


def _content(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}): check it") from error
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: is not text in UTF-8 (byte {error.start}), {TEXT_FORMS}: check the file"
        ) from error
    if "\0" in content:
        raise FileError(f"{path}: is not text but binary, {TEXT_FORMS}: check the file")
    return content


def _objects(path: Path, lines: list[tuple[int, str]]) -> Iterator[TextLine]:
    for number, line in lines:
        place = f"{path}:{number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise FileError(
                f"{place}: no JSON ({error}), expected one object a line, such as "
                '{"text": "...", "label": 0}: correct the line'
            ) from error
        if not isinstance(found, dict):
            raise FileError(
                f"{place}: a {type(found).__name__}, expected an object with a text: correct it"
            )
        yield TextLine(place, _text(place, found), _label(place, found))


def _text(place: str, found: dict[str, Any]) -> str:
    field = next((name for name in _TEXT if name in found), None)
    if field is None:
        raise FileError(
            f"{place}: has the fields {', '.join(found) or 'none'}, expected one named "
            f"{' or '.join(_TEXT)}: rename it"
        )
    text = found[field]
    if not isinstance(text, str) or not text.strip():
        raise FileError(f"{place}: {field} is {text!r}, expected a text: correct or remove it")
    return text


def _label(place: str, found: dict[str, Any]) -> int | str | None:
    label = next((found[name] for name in _LABEL if name in found), None)
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise FileError(
        f"{place}: label {label!r}, expected a number or the name of a class: correct it"
    )


def _check_labels(path: Path, found: list[TextLine]) -> None:
    without = [line for line in found if line.label is None]
    if without and len(without) < len(found):
        raise FileError(
            f"{without[0].place}: has no label, though others in {path} have, expected all or "
            "none: add it"
        )


def no_texts(name: str, spec: str) -> InputError:
    """Return the error for images that are given to a model of texts."""
    return InputError(f"--data {spec}: {name} takes texts, {TEXT_FORMS}: pass --data FILE")
