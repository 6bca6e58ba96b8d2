"""Which of the formats a file is in, and what the library of safetensors lets pass."""

from pathlib import Path

from fastplastic.errors import FileError
from fastplastic.files.fields import load_json


def is_safetensors(path: Path) -> bool:
    """Tell by the name or, whatever it is called, by the JSON after eight bytes of length."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def check_names(path: Path) -> None:
    """Refuse safetensors in whose header a name stands twice: which tensor is meant is not known.

    Raises:
        FileError: The file is so.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        load_json(header)
    except ValueError as error:
        raise FileError(f"{path}: corrupt safetensors ({error}): get it anew") from None
