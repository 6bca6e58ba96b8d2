"""The only code that reads or writes files of weights, plans and profiles.

Its names are loaded on first use: profiles as JSON are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastplastic.files.atomic import atomic_write
    from fastplastic.files.backup import backup_of, keep_backup
    from fastplastic.files.checkpoint import (
        UNFITTED,
        Loaded,
        load_into,
        load_state_dict,
        read_metadata,
        save_state_dict,
        save_tensors,
    )
    from fastplastic.files.fields import (
        SHARE,
        Check,
        Fields,
        integer,
        is_number,
        is_share,
        load_json,
        one_of,
    )
    from fastplastic.files.folder import save_folder
    from fastplastic.files.formats import is_safetensors
    from fastplastic.files.jsonable import plain
    from fastplastic.files.plan_file import StoredPlan, read_plan, write_plan
    from fastplastic.files.profile_file import StoredProfile, read_profile, write_profile
    from fastplastic.files.profile_json import (
        SCHEMA_VERSION,
        LayerFigures,
        ProfileFigures,
        figures_of,
        parse_profile_json,
        read_profile_json,
    )
    from fastplastic.files.training_file import TrainingFile, save_torch

_NAMES = {
    "atomic": ("atomic_write",),
    "backup": ("backup_of", "keep_backup"),
    "checkpoint": (
        "UNFITTED", "Loaded", "load_into", "load_state_dict", "read_metadata", "save_state_dict",
        "save_tensors",
    ),
    "fields": (
        "SHARE", "Check", "Fields", "integer", "is_number", "is_share", "load_json", "one_of",
    ),
    "folder": ("save_folder",),
    "formats": ("is_safetensors",),
    "jsonable": ("plain",),
    "plan_file": ("StoredPlan", "read_plan", "write_plan"),
    "profile_file": ("StoredProfile", "read_profile", "write_profile"),
    "profile_json": (
        "SCHEMA_VERSION", "LayerFigures", "ProfileFigures", "figures_of", "parse_profile_json",
        "read_profile_json",
    ),
    "training_file": ("TrainingFile", "save_torch"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "SCHEMA_VERSION",
    "SHARE",
    "UNFITTED",
    "Check",
    "Fields",
    "LayerFigures",
    "Loaded",
    "ProfileFigures",
    "StoredPlan",
    "StoredProfile",
    "TrainingFile",
    "atomic_write",
    "backup_of",
    "figures_of",
    "integer",
    "is_number",
    "is_safetensors",
    "is_share",
    "keep_backup",
    "load_into",
    "load_json",
    "load_state_dict",
    "one_of",
    "parse_profile_json",
    "plain",
    "read_metadata",
    "read_plan",
    "read_profile",
    "read_profile_json",
    "save_folder",
    "save_state_dict",
    "save_tensors",
    "save_torch",
    "write_plan",
    "write_profile",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
