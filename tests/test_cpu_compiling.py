"""Compiled code of the Numba kernels on disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from numba import njit
from numba.core.caching import _CacheLocator

from fastplastic.kernels.cpu import compiling
from fastplastic.kernels.cpu.compiling import c_function, cached
from fastplastic.kernels.cpu.memory import int_at


def test_no_folder_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every process compiles anew."""

    def fail(self: _CacheLocator) -> None:
        raise OSError("read-only")

    def twice(x: int) -> int:
        return 2 * x

    def kernel(arguments: int, task: int) -> None:
        int_at(arguments)[0] = task

    monkeypatch.setattr(_CacheLocator, "ensure_cache_path", fail)
    assert cached(njit, twice)(4) == 8
    assert c_function("test")(kernel).address > 0


def test_compiled_code_is_found_again() -> None:
    """In a second process nothing is compiled: kernels on disk are keyed by their sources."""
    code = (
        "import torch, numba.core.caching as c\n"
        "from fastplastic.kernels import activation_stats, gradient_stats, parameter_stats\n"
        "seen = []\n"
        "save, load = c.Cache.save_overload, c.Cache.load_overload\n"
        "c.Cache.save_overload = lambda *a: seen.append('compiled') or save(*a)\n"
        "def found(*a):\n"
        "    code = load(*a)\n"
        "    seen.append('found') if code is not None else None\n"
        "    return code\n"
        "c.Cache.load_overload = found\n"
        "x = torch.ones(4, 3)\n"
        "activation_stats(x, 1, 'relu'); gradient_stats(x); parameter_stats([x], [x])\n"
        "print(*seen)\n"
    )
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    # Reading activations and gradients and their merge; reading weights and their fold.
    assert result.stdout.split() == ["found"] * 6


def test_that_kernels_are_being_compiled_is_told_once(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from fastplastic.kernels import gradient_stats\n"
        "from fastplastic.kernels.cpu.compiling import tell_of_compiling\n"
        "tell_of_compiling(lambda: print('compiling'))\n"
        "gradient_stats(torch.ones(4, 3))\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert told == ["compiling\n", ""]


def test_kernels_are_kept_by_the_files_whose_numbers_go_into_them() -> None:
    folder = Path(compiling.__file__).parent
    for file in folder.glob("*.py"):
        names = re.findall(r"^from fastplastic.kernels.(\w+) import", file.read_text(), re.M)
        # What checks arguments gives no numbers.
        assert not set(names) & {"dispatch"}, file
