"""Find the units of a PyTorch model that no longer learn, and re-initialise them.

The names in `__all__` are the public ones. They are loaded on first use, so that
`import fastplastic` is quick and pulls in neither torch nor any other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastplastic.comparison import ProfileComparison, compare
    from fastplastic.errors import FastPlasticError
    from fastplastic.measure import LayerProfile, Monitor, Profile, findings, profile
    from fastplastic.planning import Plan, plan
    from fastplastic.processes import alone
    from fastplastic.reinit import ReinitReport, reinit_, reinit_checkpoint
    from fastplastic.training import Recycler
    from fastplastic.trials import FineTuning, TrainSettings, Trial, finetune, trial

__version__ = "0.1.0"

_NAMES = {
    "comparison": ("ProfileComparison", "compare"),
    "errors": ("FastPlasticError",),
    "measure": ("LayerProfile", "Monitor", "Profile", "findings", "profile"),
    "planning": ("Plan", "plan"),
    "processes": ("alone",),
    "reinit": ("ReinitReport", "reinit_", "reinit_checkpoint"),
    "training": ("Recycler",),
    "trials": ("FineTuning", "TrainSettings", "Trial", "finetune", "trial"),
}
# Modules that are reached as fastplastic.NAME, loaded on first use too.
_MODULES = ("criteria", "diagnostics", "integrations", "kernels", "reinit", "training")
_HOME = {name: package for package, names in _NAMES.items() for name in names}
__all__ = ["FastPlasticError", "FineTuning", "LayerProfile", "Monitor", "Plan", "Profile"]
__all__ += [
    "ProfileComparison",
    "Recycler",
    "ReinitReport",
    "TrainSettings",
    "Trial",
    "__version__",
    "alone",
    "compare",
    "findings",
    "finetune",
    "plan",
    "profile",
]
__all__ += ["reinit_", "reinit_checkpoint", "trial"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
