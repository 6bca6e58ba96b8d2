"""The only code that reads or writes files of weights, plans and profiles."""

from fastplastic.files.atomic import atomic_write
from fastplastic.files.checkpoint import (
    UNFITTED,
    Loaded,
    load_into,
    load_state_dict,
    read_metadata,
    save_state_dict,
)
from fastplastic.files.fields import SHARE, Check, integer, is_number, is_share, one_of
from fastplastic.files.jsonable import plain
from fastplastic.files.plan_file import StoredPlan, read_plan, write_plan
from fastplastic.files.profile_file import (
    SCHEMA_VERSION,
    StoredProfile,
    read_profile,
    write_profile,
)

__all__ = [
    "SCHEMA_VERSION",
    "SHARE",
    "UNFITTED",
    "Check",
    "Loaded",
    "StoredPlan",
    "StoredProfile",
    "atomic_write",
    "integer",
    "is_number",
    "is_share",
    "load_into",
    "load_state_dict",
    "one_of",
    "plain",
    "read_metadata",
    "read_plan",
    "read_profile",
    "save_state_dict",
    "write_plan",
    "write_profile",
]
