"""Which of the formats a file is in."""

from pathlib import Path


def is_safetensors(path: Path) -> bool:
    """Tell by the name or, whatever it is called, by the JSON after eight bytes of length."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
