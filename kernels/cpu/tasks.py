"""Run compiled tasks on all threads.

Kernels of `Work`, called many times in a step, are C functions (arguments, task) that read their
arguments from an array of int64, and run on the threads of torch. Those of `on_threads`, called a
few times for all weights together, are functions that take tasks themselves.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic
from torch import get_num_threads

from fastplastic.kernels.cpu.compiling import cached, inline
from fastplastic.kernels.cpu.memory import int_at, next_task

# Words in front of the arguments: the next task, how many are done, the addresses of the kernel and
# of what follows the last task (or 0), and the number of tasks.
_NEXT, _DONE, _KERNEL, _AFTER, _TASKS, _HEAD = range(6)


# Whoever uses the scratch memory or prepared work holds it: hooks run on several threads.
LOCK = threading.Lock()
_buffer = np.empty(0)
_buffer_address = 0


def scratch(size: int) -> int:
    """Return the address of so many float64, in the same place while that is big enough."""
    global _buffer, _buffer_address
    if _buffer.size < size:
        _buffer = np.empty(size)
        _buffer_address = int(_buffer.ctypes.data)
    return _buffer_address


class Work:
    """Tasks of a kernel, prepared once and run any number of times, with the lock held.

    Each thread takes the next task when it is done with one; what a task does must not depend on
    that.

    Args:
        kernel: C function (address of int64 arguments, task).
        tasks: Number of tasks.
        arguments: The arguments that are always the same; those of a run precede them.
        varying: Number of those.
        after: C function like the kernel that is called once when all tasks are done, or None.
    """

    def __init__(
        self, kernel: Any, tasks: int, arguments: Sequence[int], *, varying: int, after: Any = None
    ) -> None:
        head = (0, 0, kernel.address, after.address if after else 0, tasks)
        words = (*head, *[0] * varying, *arguments)
        self._words = (ctypes.c_int64 * len(words))(*words)
        self._address = ctypes.addressof(self._words)
        self._varying = slice(_HEAD, _HEAD + varying)
        # Compiled code lives as long as these.
        self._functions = kernel, after
        self._serial = tasks == 1

    def run(self, *arguments: int) -> None:
        """Do all tasks with the arguments that vary, on as many threads as torch uses."""
        words = self._words
        words[_NEXT] = words[_DONE] = 0
        words[self._varying] = list(arguments)
        threads = get_num_threads()
        if self._serial or threads == 1:
            _work.ctypes(self._address)
        elif (parallel := _torch_parallel()) is not None:
            parallel(_work.address, self._address, threads, 0)
        else:
            on_threads(_work.ctypes, self._address)


def on_threads(function: Callable[..., object], *arguments: Any, most: int | None = None) -> None:
    """Call a function that lets go of the GIL on as many threads as torch uses, or fewer, at once.

    The threads share the work by a counter among the arguments. They end with the call: threads
    that wait for work are lost when a process forks.
    """
    count = min(get_num_threads(), most or get_num_threads())
    if count == 1:
        function(*arguments)
        return
    with ThreadPoolExecutor(count - 1) as pool:
        others = [pool.submit(function, *arguments) for _ in range(count - 1)]
        function(*arguments)
    for other in others:
        other.result()


@cache
def _torch_parallel() -> Any:
    """Return GOMP_parallel (function, data, threads, flags) of the OpenMP library of torch.

    So there is no second pool of threads beside torch's, which keep their cores busy for a while
    after each operation, and calls from several threads are safe. The library is found as a
    dependency of torch's own; None where there is none.

    A watched step of ResNet-50 (batch 4 at 160 px, 2 cores, 50 steps each in turns) takes 7.6 %
    longer with the threads of Numba's `prange` (workqueue), and 4.2 % longer on one thread: the
    medians of the ratios step by step. By the fastest steps it is 6.6 % and 0.7 %; with Numba's own
    OpenMP at 128 px 1.9 %.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@inline
def _take_tasks(data: Any) -> None:
    given = int_at(data)
    task = next_task(data + 8 * _NEXT)
    while task < given[_TASKS]:
        _call(given[_KERNEL], data + 8 * _HEAD, task)
        if next_task(data + 8 * _DONE) == given[_TASKS] - 1 and given[_AFTER] != 0:
            _call(given[_AFTER], data + 8 * _HEAD, 0)
        task = next_task(data + 8 * _NEXT)


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
