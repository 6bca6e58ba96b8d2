"""How the functions of the CPU kernels are compiled by Numba, and kept on disk."""

from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from numba import cfunc, njit, types
from numba.extending import overload

# Of functions that kernels alone call: nothing is made for calls from elsewhere.
_INSIDE = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "no_rewrites": True}
# Files of the package around whose numbers do not go into what is compiled.
_OTHERS = ("__init__", "checks", "dispatch")
# Called when the first kernel was not on disk: some seconds of compiling lie ahead.
_told: list[Callable[[], None]] = []
_TASK = types.void(types.int64, types.int64)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def inline(function: _Function) -> _Function:
    """Compile a function that kernels call; products and sums may be fused, nothing reordered."""
    return _compiled(function, {"contract"})


def inline_sums(function: _Function) -> _Function:
    """Compile a function whose sums may be added up in any order, of any numbers."""
    return _compiled(function, {"contract", "reassoc", "nsz"})


def inline_finite(function: _Function) -> _Function:
    """Compile a function of finite numbers, in any order, so that LLVM reduces by vectors."""
    return _compiled(function, True)


def outlined(function: _Function) -> _Function:
    """Compile a function that kernels call where they rarely come."""
    result: _Function = njit(error_model="numpy", **_INSIDE)(function)
    return result


def _compiled(function: _Function, fastmath: Any) -> _Function:
    # Division by zero gives infinity or NaN as everywhere else.
    options = {"forceinline": True, "fastmath": fastmath, "error_model": "numpy", **_INSIDE}
    result: _Function = njit(**options)(function)
    return result


def deferred(stub: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Let calls of a stub compile as what the decorated function returns for their types."""
    options = {"forceinline": True, "error_model": "numpy", **_INSIDE}
    decorate: Callable[[_Function], _Function] = overload(
        stub, jit_options=options, prefer_literal=True
    )
    return decorate


def c_function(name: str) -> Callable[[Any], Any]:
    """Compile a function (address of int64 arguments, task), and keep it on disk if possible.

    Its closure may hold numbers and strings only, or it is never found again.

    Args:
        name: By which it is kept, the same for the same closure only.
    """

    def compiled(kernel: Any) -> Any:
        # A file of its own on disk for each kernel.
        kernel.__qualname__ = name.replace(":", "-")
        result = cached(partial(cfunc, _TASK), kernel, error_model="numpy")
        if not result.cache_hits:
            while _told:
                _told.pop()()
        return result

    return compiled


def tell_of_compiling(tell: Callable[[], None]) -> None:
    """Have a function called, once, when a kernel was not on disk: more are likely to follow."""
    _told[:] = [tell]


def cached(decorator: Any, function: Any, **options: Any) -> Any:
    """Compile a function, and keep it on disk if there is a folder that may be written to."""
    # Numba forgets what it has on disk when the file of the function changes. What the function is
    # made of stands in other files, so the name it is kept by changes with all of them.
    function.__qualname__ += f"-{_digest_of_sources()}"
    try:
        return decorator(cache=True, **options)(function)
    except RuntimeError:
        return decorator(**options)(function)


@cache
def _digest_of_sources() -> str:
    # Their numbers come from the files of the package around them.
    folder = Path(__file__).parent
    digest = sha256()
    around = [file for file in folder.parent.glob("*.py") if file.stem not in _OTHERS]
    for file in sorted([*folder.glob("*.py"), *around]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
