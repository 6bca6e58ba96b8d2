"""Compiled code of the Numba kernels on disk."""

import subprocess
import sys


def test_no_folder_for_compiled_code():
    """Then every process compiles anew."""
    code = (
        "import torch\n"
        "from fastplastic.kernels import Law, activation_stats, resample_\n"
        "from numba.core.caching import _CacheLocator\n"
        "def fail(self): raise OSError('read-only')\n"
        "_CacheLocator.ensure_cache_path = fail\n"
        "x = torch.ones(4, 3)\n"
        "print(activation_stats(x, 1, 'relu')[1].tolist())\n"
        "resample_([x], ['x'], [Law('uniform', 2.0, 0.0)])\n"
        "print(x.unique().tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["[4.0, 4.0, 4.0]", "[2.0]"], result.stderr


def test_compiled_code_is_found_again(tmp_path):
    """In a second process nothing is compiled: kernels on disk are keyed by their sources."""
    code = (
        "import torch, numba.core.caching as c\n"
        "from fastplastic.kernels import activation_stats, gradient_stats, parameter_stats\n"
        "saved = []\n"
        "save = c.Cache.save_overload\n"
        "c.Cache.save_overload = lambda *a: saved.append(a[0]) or save(*a)\n"
        "x = torch.ones(4, 3)\n"
        "activation_stats(x, 1, 'relu'); gradient_stats(x); parameter_stats([x], [x])\n"
        "print(len(saved))\n"
    )
    counts = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        counts.append(int(result.stdout))
    assert counts[0] > 0
    assert counts[1] == 0
