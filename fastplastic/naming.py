"""The forms in which a model is named: timm's names, and prefixes for what is not of timm."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fastplastic.errors import InputError

ModelKind = Literal["timm", "torchvision", "folder", "factory"]

# {prefix: where the model is from}.
_PREFIXES: dict[str, ModelKind] = {
    "torchvision": "torchvision",
    "hf": "folder",
    "hf-hub": "timm",
    "hf_hub": "timm",
    "local-dir": "timm",
}
_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
MODEL_FORMS = (
    ("NAME", "a timm model, also NAME.TAG for one of its weights"),
    ("torchvision:NAME", "a classifier of torchvision, also NAME.TAG"),
    ("hf:FOLDER", "a Hugging Face model folder: images, texts, causal language models"),
    ("package.module:factory", "a function of yours that returns a module"),
    ("hf-hub:OWNER/NAME", "a timm model on the hub"),
    ("local-dir:FOLDER", "a timm model in a folder"),
)
_FORMS = ", ".join(form for form, _ in MODEL_FORMS[:-1]) + f" or {MODEL_FORMS[-1][0]}"


@dataclass(frozen=True)
class ModelName:
    """A model's name in its parts.

    Attributes:
        text: The name as it was given.
        kind: Where the model is from.
        rest: What follows the prefix; of timm's names, and of a factory, all of it.
    """

    text: str
    kind: ModelKind
    rest: str

    @classmethod
    def of(cls, text: str) -> "ModelName":
        """Take a name apart; InputError where it has none of the forms."""
        prefix, colon, rest = text.partition(":")
        if colon and prefix in _PREFIXES:
            if not rest.strip():
                raise InputError(f"unknown model '{text}': {_expected(prefix)}")
            kind = _PREFIXES[prefix]
            return cls(text, kind, text if kind == "timm" else rest)
        if not colon and "/" not in text:
            return cls(text, "timm", text)
        if _FACTORY.fullmatch(text):
            return cls(text, "factory", text)
        raise InputError(f"unknown model '{text}': {expected_forms(text)}")

    @property
    def stem(self) -> str:
        """The name as part of a file's name: without prefix, folders and colons."""
        last = Path(self.rest).name if self.kind != "factory" else self.rest.rpartition(":")[2]
        return last.replace(":", "-") or "model"


def expected_forms(text: str) -> str:
    """Return the forms that were expected in place of a name, with the one that is near to it."""
    prefix, colon, rest = text.partition(":")
    near = get_close_matches(prefix.lower(), _PREFIXES, n=1) if colon else []
    hint = f": did you mean {near[0]}:{rest}?" if near else ""
    return f"expected {_FORMS}{hint}"


def _expected(prefix: str) -> str:
    forms = [form for form, _ in MODEL_FORMS if form.startswith(prefix.replace("_", "-") + ":")]
    return f"expected {forms[0]}"
