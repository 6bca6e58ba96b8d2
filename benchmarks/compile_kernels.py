"""Compile every Triton kernel for GPUs that need not be there; print registers and shared memory.

    python benchmarks/compile_kernels.py [--target sm_80 sm_90 gfx942] [--json]

The launchers themselves run, on tensors in CPU memory, with a driver that names a GPU and a launch
that only compiles: so what is compiled is what Triton would compile on that GPU, with its own
specialisation on dtypes and alignment. Results are never computed.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Triton reads this when it is imported: the interpreter compiles nothing.
os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastplastic.kernels import ACTIVATIONS, WeightShard
from fastplastic.kernels.elements import operands_of
from fastplastic.kernels.law import Law
from fastplastic.kernels.selection import Query, Selection

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Columns of a weight: there numbers of elements take a division.
_PARTS = [WeightShard((256, 2048), (0, 512))]
# With `quick`: of functions that are made alike, one.
_KINDS = (
    "identity", "relu", "leaky_relu", "elu", "selu", "gelu", "mish", "tanh", "hardswish",
)  # fmt: skip
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel.

    Attributes:
        case: The launch that needs it.
        kernel: Name of the kernel.
        target: Name of the GPU.
        registers: Vector registers per thread.
        shared: Bytes of shared memory per program.
        spilled: Bytes of memory per thread that registers are spilled to.
        loads: Bytes of each kind of load from global memory that occurs, per thread.
        fused: Number of fused multiply-adds in PTX; -1 on other GPUs.
    """

    case: str
    kernel: str
    target: str
    registers: int
    shared: int
    spilled: int
    loads: tuple[int, ...]
    fused: int


class _Device:
    """A driver that knows which GPU to compile for, and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def cases(quick: int = 0) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches whose kernels are compiled, by name, dtype first.

    With `quick` 1 fp16 is left out, and activation functions of each kind are compiled in bf16
    alone, but for ReLU and GELU; with 2, two functions and fewer layouts and scores are left.
    What differs only in how a dtype is converted is not repeated.
    """
    for dtype in ("fp32", "bf16") if quick else DTYPES:
        yield from _stats_cases(dtype, quick)
        if dtype != "fp16":
            yield from _many_cases(dtype)
        yield from _parameter_cases(dtype)
        if dtype != "fp16":
            yield from _select_cases(dtype, quick)
            yield from _resample_cases(dtype)


def _stats_cases(dtype: str, quick: int) -> Iterator[tuple[str, Callable[[], object]]]:
    activation_stats = _launcher("activation_stats")
    gradient_stats = _launcher("gradient_stats")
    planes = torch.empty(4, 64, 32, 32, dtype=DTYPES[dtype])
    layouts = {
        "tokens": torch.empty(4096, 256, dtype=DTYPES[dtype]),
        "planes": planes,
        "odd tokens": torch.empty(4096, 37, dtype=DTYPES[dtype]),
        "odd planes": planes[:, :, :7, :7].contiguous(),
        "crop": planes[:, :, 1:-1, 1:-1],
    }
    for layout, x in layouts.items():
        if layout in ("tokens", "planes"):
            every = {("bf16", "tokens"): 1, ("fp32", "planes"): 0}.get((dtype, layout), -1) >= quick
            names = ("relu", "gelu") if not every else _KINDS if quick else tuple(ACTIVATIONS)
        elif dtype == "fp32" and quick < 2:
            names = ("gelu",)
        else:
            continue
        yield f"{dtype} {layout}", lambda x=x: gradient_stats(x)
        for name in names:
            yield f"{dtype} {layout} {name}", lambda x=x, name=name: activation_stats(x, 1, name)


def _many_cases(dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.empty(8, 512, 256, dtype=DTYPES[dtype])
    mask = torch.empty(8 * 512, dtype=torch.bool)
    table = torch.empty(9, 512, dtype=torch.float64)
    stats = _module("activation_stats").foreach_activation_stats
    two = [x, x], [-1, -1], ["gelu", "gelu"], [0, 256]
    yield f"{dtype} tokens masked gelu", lambda: stats(*two, out=table, masks=[mask, mask])
    yield f"{dtype} tokens many gelu", lambda: stats(*two, out=table)


def _parameter_cases(dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    parameter_stats = _launcher("parameter_stats")
    w = torch.empty(256, 512, dtype=DTYPES[dtype])
    for layout, weight in (("rows", w), ("transposed", w.t())):
        yield f"{dtype} {layout}", lambda weight=weight: parameter_stats([weight], [weight])
    if dtype == "bf16":
        yield "bf16 w, fp32 dw", lambda: parameter_stats([w], [w.float()])


def _select_cases(dtype: str, quick: int) -> Iterator[tuple[str, Callable[[], object]]]:
    module = _module("select")
    w = torch.empty(256, 512, dtype=DTYPES[dtype])
    table = np.zeros(1, dtype=np.int64)
    numbers = {"swr": ("key", "word")}
    if dtype == "fp32" and quick > 1:
        numbers["random"] = ("word",)
    elif dtype == "fp32":
        numbers = {"swr": ("key", "word", "element"), "gradient": ("key",), "random": ("word",)}
    for criterion in numbers:
        # One query of each kind; the search itself would need the counts.
        histogram = _module("histogram").GpuHistogram(
            criterion, operands_of(criterion, [w], [w]), [0]
        )
        for number in numbers[criterion]:
            query = Query(number, 24, 8, table, table, table)
            yield f"{dtype} {criterion} {number}", lambda h=histogram, q=query: h(q)
        chosen = Selection(criterion, 0, ("w",), (0,), (0,), (0,), (0,), 0)
        yield f"{dtype} {criterion}", lambda c=chosen: module.selection_masks(c, [w], [w])
    if dtype == "fp32":
        parts = _module("histogram").GpuHistogram("swr", operands_of("swr", [w], [w]), [0], _PARTS)
        for number in ("key", "word", "element"):
            query = Query(number, 24, 8, table, table, table)
            yield f"{dtype} swr {number} shards", lambda q=query: parts(q)
        chosen = Selection("swr", 0, ("w",), (0,), (0,), (0,), (0,), 0)
        masks = partial(module.selection_masks, chosen, [w], [w], shards=_PARTS)
        yield f"{dtype} swr shards", masks


def _resample_cases(dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    resample_ = _module("resample").resample_
    w = torch.empty(256, 512, dtype=DTYPES[dtype])
    mask = torch.empty(256, 512, dtype=torch.bool)
    law = Law("normal", 0.0, 0.02)
    yield f"{dtype} all", lambda: resample_([w], ["w"], [law])
    yield f"{dtype} masks", lambda: resample_([w], ["w"], [law], masks=[mask])
    if dtype == "fp32":
        both = {"masks": [mask], "shards": _PARTS}
        yield f"{dtype} masks shards", lambda: resample_([w], ["w"], [law], **both)


def _launcher(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_module(name), name)
    return function


def _module(name: str) -> Any:
    return importlib.import_module(f"fastplastic.kernels.gpu.{name}")


def compile_case(case: str, launch: Callable[[], object], target: str) -> list[Compiled]:
    """Compile what one launch needs."""
    with _compiling(TARGETS[target]) as kernels:
        launch()
    return [_measured(case, kernel, target) for kernel in kernels]


@contextmanager
def _compiling(target: GPUTarget) -> Iterator[list[Any]]:
    run = JITFunction.run
    kernels = []

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return kernels[-1]

    driver.set_active(_Device(target))
    JITFunction.run = only_compile
    for function in _jit_functions():
        function.device_caches.clear()
    try:
        yield kernels
    finally:
        JITFunction.run = run


def _jit_functions() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.startswith("fastplastic.kernels."):
            yield from (v for v in vars(module).values() if isinstance(v, JITFunction))


def _measured(case: str, kernel: Any, target: str) -> Compiled:
    if "cubin" in kernel.asm:
        registers, shared, spilled = _nvidia(kernel.asm["cubin"])
        shared = max(shared, kernel.metadata.shared)
        ptx = kernel.asm["ptx"]
        loads = {4 * int(n or 1) for n in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b32", ptx)}
        fused = ptx.count("fma.rn")
    else:
        text, fused = kernel.asm["amdgcn"], -1
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        # Scalar registers spill into lanes of vector registers, which needs no memory.
        spilled = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        shared = kernel.metadata.shared
        widths = re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)
        loads = {4 * int(n or 1) for n in widths}
    return Compiled(
        case, kernel.name, target, registers, shared, spilled, tuple(sorted(loads)), fused
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0


def _nvidia(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, shared memory and bytes of stack that are written to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            command = [tool, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        text = dump("--dump-resource-usage")
        match = _RESOURCES.search(text)
        assert match, text
        registers, stack, shared, local = map(int, match.groups())
        # ptxas makes room on the stack now and then, and uses none of it.
        unused = stack + local > 0 and not re.search(r"\b(STL|LDL)\b", dump("--dump-sass"))
    return registers, shared, 0 if unused else stack + local


def main() -> None:
    """Print a table, or JSON for the tests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="count", default=0, help="fewer variants; twice: few")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [
        compiled
        for target in arguments.target
        for case, launch in cases(arguments.quick)
        for compiled in compile_case(case, launch, target)
    ]
    if arguments.json:
        print(json.dumps([asdict(compiled) for compiled in found]))
        return
    _print_table(found, arguments.target)


def _print_table(found: list[Compiled], targets: list[str]) -> None:
    """Print one row for each kernel and dtype, with the range over its variants."""
    print(f"| kernel | dtype | registers: {' | '.join(targets)} | shared memory, bytes | spilled |")
    print(f"|---|---|{'--:|' * (len(targets) + 2)}")
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for c in found:
        groups.setdefault((c.kernel.strip("_"), c.case.split(" ")[0]), []).append(c)
    for (kernel, dtype), own in groups.items():
        cells = []
        for target in targets:
            registers = [c.registers for c in own if c.target == target]
            low, high = min(registers, default=0), max(registers, default=0)
            cells.append(f"{low}" if low == high else f"{low} to {high}")
        shared, spilled = max(c.shared for c in own), max(c.spilled for c in own)
        print(f"| {kernel} | {dtype} | {' | '.join(cells)} | {shared} | {spilled} |")


if __name__ == "__main__":
    main()
