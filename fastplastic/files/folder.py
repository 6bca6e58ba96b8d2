"""Write a folder like that of a Hugging Face model, with other weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastplastic.errors import FileError
from fastplastic.files.atomic import atomic_write
from fastplastic.files.checkpoint import save_tensors

# Weights, also in the forms of other frameworks, which would be those of before.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.ot", "*.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack",
    "*.onnx",
)  # fmt: skip
EXPORTS = ("onnx", "openvino", "coreml")


def save_folder(
    path: Path, source: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], force: bool
) -> None:
    """Write model.safetensors, and a copy of all that lies beside the weights of another folder.

    The weights come first and each file appears whole; config.json comes last, so that no folder
    can be taken for a model before it is one.

    Args:
        path: The folder; missing, or empty.
        source: The folder whose other files are copied.
        tensors: The weights.
        texts: {name: content} of files that differ from those of the source.
        force: Write into a folder with files, and over those.

    Raises:
        FileError: There are files and `force` is not set, or it cannot be written.
    """
    if path.is_dir() and any(path.iterdir()) and not force:
        raise FileError(f"{path}: is a folder with files: name another, or pass --force")
    try:
        path.mkdir(exist_ok=True)
        save_tensors(path / "model.safetensors", tensors, force, {"format": "pt"})
        for name in _others(source):
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, force) as temporary:
                if str(name) in texts:
                    temporary.write_text(texts[str(name)], encoding="utf-8")
                else:
                    shutil.copyfile(source / name, temporary)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror}): check the path") from error


def _others(source: Path) -> list[Path]:
    """Return the files beside the weights, without what is hidden; config.json is the last."""
    files = (file.relative_to(source) for file in source.rglob("*") if file.is_file())
    kept = [
        file
        for file in files
        # Of other frameworks, and the weights themselves; parts of a pipeline have their own.
        if not (len(file.parts) == 1 and any(file.match(x) for x in WEIGHTS))
        and file.parts[0] not in EXPORTS
        and not any(part.startswith(".") for part in file.parts)
    ]
    return sorted(kept, key=lambda file: (file == Path("config.json"), file))
