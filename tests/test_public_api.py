from importlib import import_module
from importlib.util import find_spec

import pytest

import fastplastic

PUBLIC_NAMES = {
    "FastPlasticError",
    "FineTuning",
    "LayerProfile",
    "Monitor",
    "Plan",
    "Profile",
    "ProfileComparison",
    "Recycler",
    "ReinitReport",
    "TrainSettings",
    "Trial",
    "__version__",
    "findings",
    "alone",
    "compare",
    "finetune",
    "plan",
    "profile",
    "reinit_",
    "reinit_checkpoint",
    "trial",
}


def test_public_names():
    assert set(fastplastic.__all__) == PUBLIC_NAMES
    assert set(dir(fastplastic)) >= PUBLIC_NAMES


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_is_there_and_documented(name):
    value = getattr(fastplastic, name)
    assert name == "__version__" or value.__doc__


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"__version__"}))
def test_no_module_has_the_name_of_a_public_name(name):
    assert find_spec(f"fastplastic.{name}") is None


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
    for name in ("InputError", "FileError", "FingerprintError", "GateError"):
        assert issubclass(getattr(errors, name), fastplastic.FastPlasticError)
