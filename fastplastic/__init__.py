"""Find the units of a PyTorch model that no longer learn, and re-initialise them.

The names below are the public ones. They are loaded on first use, so that `import fastplastic` is
quick and pulls in neither torch nor any other library.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastplastic.errors import FastPlasticError
    from fastplastic.monitor import Monitor
    from fastplastic.planner import Plan, plan
    from fastplastic.profile import LayerProfile, Profile, profile
    from fastplastic.reinit import ReinitReport, reinit_

__version__ = "0.1.0"

__all__ = [
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
]

_MODULE_OF = {
    "FastPlasticError": "errors",
    "LayerProfile": "profile",
    "Monitor": "monitor",
    "Plan": "planner",
    "Profile": "profile",
    "ReinitReport": "reinit",
    "plan": "planner",
    "profile": "profile",
    "reinit_": "reinit",
}


class _Package(ModuleType):
    """The package; its public names cannot be replaced by a submodule of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds a submodule here: `fastplastic.profile` stays the function.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those not loaded yet."""
    return sorted({*globals(), *__all__})
