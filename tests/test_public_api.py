import subprocess
import sys
from importlib import import_module
from types import FunctionType

import pytest

import fastplastic

PUBLIC_NAMES = {
    "FastPlasticError",
    "LayerProfile",
    "Monitor",
    "Plan",
    "Profile",
    "ReinitReport",
    "__version__",
    "plan",
    "profile",
    "reinit_",
}


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_public_names():
    assert set(fastplastic.__all__) == PUBLIC_NAMES
    assert set(dir(fastplastic)) >= PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_is_there_and_documented(name):
    value = getattr(fastplastic, name)
    assert name == "__version__" or value.__doc__


@pytest.mark.parametrize(
    "first",
    [
        "import fastplastic",
        "import fastplastic.profile",
        "import fastplastic.monitor, fastplastic.profile, fastplastic.reinit, fastplastic.planner",
        "from fastplastic.profile import Profile",
        "from fastplastic import Profile",
        "import importlib; importlib.import_module('fastplastic.profile')",
    ],
)
def test_profile_is_the_function_whatever_was_imported_first(first):
    code = f"{first}\nimport fastplastic\nprint(type(fastplastic.profile).__name__)"
    assert run(code) == "function"
    assert run(f"{code}\nimport fastplastic.profile\nprint(fastplastic.profile.__name__)").endswith(
        "profile"
    )


def test_profile_is_the_function_after_a_later_import_and_a_reload():
    function = fastplastic.profile
    module = import_module("fastplastic.profile")
    assert isinstance(function, FunctionType)
    assert fastplastic.profile is module.profile is function
    assert fastplastic.Profile is module.Profile


def test_public_names_can_be_replaced_by_a_test(monkeypatch):
    monkeypatch.setattr(fastplastic, "profile", len)
    assert fastplastic.profile is len


def test_unknown_name():
    name = "nothing_like_it"
    with pytest.raises(
        AttributeError, match=r"module 'fastplastic' has no attribute 'nothing_like_it'"
    ):
        getattr(fastplastic, name)


def test_errors_share_one_base():
    errors = import_module("fastplastic.errors")
    for name in ("InputError", "FileError", "FingerprintError"):
        assert issubclass(getattr(errors, name), fastplastic.FastPlasticError)
