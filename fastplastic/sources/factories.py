"""Models that a function of the user's makes, named as for uvicorn: package.module:factory."""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fastplastic.errors import FileError, InputError
from fastplastic.model import check_built
from fastplastic.naming import expected_forms
from fastplastic.sources.hub import reason
from fastplastic.sources.loaded import (
    LoadedModel,
    ModelRequest,
    fresh_head,
    seeded,
    with_checkpoint,
)
from fastplastic.sources.tell import IMAGENET, put_head, tell


def from_factory(request: ModelRequest) -> LoadedModel:
    """Call a function of the user's, and take the model that it returns.

    The current folder is importable, before all others, as for `python -m` and uvicorn. The
    function is called with the arguments of the request's `model_kwargs`, and with those of
    num_classes, in_chans and img_size that are asked for and that it takes.

    Raises:
        InputError: There is no such module or function, it fails or returns no module, or the
            model does not run on images.
        FileError: The checkpoint does not fit.
    """
    with seeded(request.seed):  # modules may draw too, when they are imported
        factory = _find(request.name)
    arguments = dict(request.model_kwargs) | _taken(factory, request)
    model = _called(request, factory, arguments)
    config = dict(getattr(model, "pretrained_cfg", None) or IMAGENET)
    channels, *side = config["input_size"]
    config["input_size"] = (request.in_chans or channels, *(request.img_size or side))
    tell(model, request.name, config)
    told: Any = model
    head, wanted, had = "", request.num_classes, told.num_classes
    if wanted is not None and wanted != had:
        put_head(model, wanted, request.seed)
        head = fresh_head(wanted, had)
    return with_checkpoint(request, model, f"as {request.name} makes them", head=head)


def _find(name: str) -> Callable[..., Any]:
    path, _, attributes = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise _failed(name, f"importing {path}", error) from error
        raise InputError(
            f"{name}: no module {error.name} in {here} or among what is installed: "
            f"{expected_forms(name)}"
        ) from error
    except (Exception, SystemExit) as error:  # the code of others
        raise _failed(name, f"importing {path}", error) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise InputError(
                f"{name}: {path} has no {attributes}{_near(attribute, found)}: expected a function "
                "that returns a model"
            )
        found = getattr(found, attribute)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(
            f"{name}: is a {type(found).__name__}, expected a function that returns a model: "
            "write one"
        )
    factory: Callable[..., Any] = found
    return factory


def _near(attribute: str, holder: object) -> str:
    from difflib import get_close_matches

    near = get_close_matches(attribute, [name for name in vars(holder) if name[0] != "_"], n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _taken(factory: Callable[..., Any], request: ModelRequest) -> dict[str, Any]:
    """Return those of timm's arguments that are asked for and that the function names."""
    try:
        known = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # written in C
        known = set()
    wanted = {
        "num_classes": request.num_classes, "in_chans": request.in_chans,
        "img_size": request.img_size,
    }  # fmt: skip
    return {key: value for key, value in wanted.items() if value is not None and key in known}


def _called(
    request: ModelRequest, factory: Callable[..., Any], arguments: dict[str, Any]
) -> nn.Module:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        with seeded(request.seed):
            model = factory(**arguments)
    except (Exception, SystemExit) as error:  # the code of others
        raise _failed(request.name, f"calling it with {given or 'no arguments'}", error) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{request.name}: returned {type(model).__name__}, expected a torch.nn.Module: "
            "return the model"
        )
    check_built(model)
    return model


def _failed(name: str, doing: str, error: BaseException) -> InputError:
    if isinstance(error, (InputError, FileError)):
        return InputError(f"{name}: {doing} failed: {error}")
    return InputError(
        f"{name}: {doing} failed ({reason(error)}): correct it (FASTPLASTIC_DEBUG=1 shows where)"
    )
