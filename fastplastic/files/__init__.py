"""The only code that reads or writes files of weights, plans and profiles.

Its names are loaded on first use: profiles as JSON are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastplastic.files.atomic import atomic_write
    from fastplastic.files.backup import backup_of, keep_backup
    from fastplastic.files.beside import (
        OptimizerBeside,
        entries_beside,
        optimizers_beside,
    )
    from fastplastic.files.checkpoint import (
        UNFITTED,
        Loaded,
        check_fit,
        load_into,
        load_state_dict,
        read_metadata,
        save_state_dict,
        save_tensors,
    )
    from fastplastic.files.copying import changed_copy, left_out
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
    from fastplastic.files.many_files import nonfinite_in
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
    from fastplastic.files.shard_index import sharded
    from fastplastic.files.stores import StoredWeights, WeightStore, find_weights, open_store
    from fastplastic.files.training_file import TrainingFile, save_torch

_NAMES = {
    "atomic": ("atomic_write",),
    "backup": ("backup_of", "keep_backup"),
    "copying": ("changed_copy", "left_out"),
    "checkpoint": (
        "UNFITTED", "Loaded", "check_fit", "load_into", "load_state_dict", "read_metadata",
        "save_state_dict", "save_tensors",
    ),
    "fields": (
        "SHARE", "Check", "Fields", "integer", "is_number", "is_share", "load_json", "one_of",
    ),
    "folder": ("save_folder",),
    "formats": ("is_safetensors",),
    "jsonable": ("plain",),
    "beside": ("OptimizerBeside", "entries_beside", "optimizers_beside"),
    "many_files": ("nonfinite_in",),
    "plan_file": ("StoredPlan", "read_plan", "write_plan"),
    "profile_file": ("StoredProfile", "read_profile", "write_profile"),
    "profile_json": (
        "SCHEMA_VERSION", "LayerFigures", "ProfileFigures", "figures_of", "parse_profile_json",
        "read_profile_json",
    ),
    "shard_index": ("sharded",),
    "stores": ("StoredWeights", "WeightStore", "find_weights", "open_store"),
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
    "OptimizerBeside",
    "ProfileFigures",
    "StoredPlan",
    "StoredProfile",
    "StoredWeights",
    "TrainingFile",
    "WeightStore",
    "atomic_write",
    "backup_of",
    "changed_copy",
    "check_fit",
    "entries_beside",
    "figures_of",
    "find_weights",
    "integer",
    "is_number",
    "is_safetensors",
    "is_share",
    "keep_backup",
    "left_out",
    "load_into",
    "load_json",
    "load_state_dict",
    "nonfinite_in",
    "one_of",
    "open_store",
    "optimizers_beside",
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
    "sharded",
    "write_plan",
    "write_profile",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
