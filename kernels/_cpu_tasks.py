"""Run compiled tasks on all threads: the one parallel loop of the CPU kernels.

A kernel is a C function (arguments, task) that reads its arguments from an array of int64, so it
knows nothing of threads, compiles fast and is cached on disk.
"""

import ctypes
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, config, njit, prange, set_num_threads, types
from numba.extending import intrinsic
from torch import get_num_threads

from ._cpu_compile import cached, inline
from ._cpu_lock import LOCK
from ._cpu_memory import int_at, next_task


def run_tasks(kernel: Any, tasks: int, *arguments: int) -> None:
    """Call the C function `kernel` for each task, on as many threads as torch uses.

    Each thread takes the next task when it is done with one; what a task does must not depend on
    that.
    """
    packed = np.array((0, kernel.address, tasks, *arguments), dtype=np.int64)
    threads = get_num_threads()
    if tasks == 1 or threads == 1:
        _work.ctypes(packed.ctypes.data)
    elif (parallel := _torch_parallel()) is not None:
        parallel(_work.address, packed.ctypes.data, threads, 0)
    else:
        with LOCK:
            set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
            _numba_parallel()(packed.ctypes.data, threads)


@cache
def _torch_parallel() -> Any:
    """Return GOMP_parallel (function, data, threads, flags) of the OpenMP library of torch.

    So there is no second pool of threads beside torch's, which keep their cores busy for a while
    after each operation, and calls from several threads are safe. The library is found as a
    dependency of torch's own; None where there is none.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _numba_parallel() -> Any:
    def run(data: Any, threads: Any) -> None:
        for _ in prange(threads):
            _take_tasks(data)

    return cached(njit, run, parallel=True, nogil=True)


@inline
def _take_tasks(data: Any) -> None:
    given = int_at(data)
    task = next_task(data)
    while task < given[2]:
        _call(given[1], data + 24, task)
        task = next_task(data)


def _word(builder: Any, value: Any) -> Any:
    return builder.zext(value, ir.IntType(64)) if value.type.width < 64 else value


def _generate_call(typing: Any, function: Any, arguments: Any, task: Any) -> Any:
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word])
        casts = [_word(builder, value) for value in values]
        builder.call(builder.inttoptr(casts[0], kind.as_pointer()), casts[1:])
        return context.get_dummy_value()

    return signature, generate


_call: Any = intrinsic(_generate_call)
_work = cached(partial(cfunc, types.void(types.int64)), lambda data: _take_tasks(data))
