"""What every Triton launcher needs: the decorator of kernels, scratch memory, the right device.

Stage one of a reduction writes float32 partial sums to scratch memory, stage two folds them, so
the two launches must not be torn apart by another thread: a launcher holds `launching` around both.
"""

import inspect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

_ADDRESS_TABLES = 4
# Scratch memory starts at this many bytes and at least doubles when it is too small.
_LEAST = 1 << 20
_LOCK = threading.RLock()
_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
# What captured CUDA graphs read whenever they are replayed.
_captured: list[object] = []


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a Triton kernel; its int64 arguments never make another variant of it."""
    parameters = inspect.signature(function).parameters.items()
    integers = [name for name, value in parameters if value.annotation is tl.int64]
    return triton.jit(function, do_not_specialize=integers)


def device_function(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return triton.jit(function)


def check_devices(tensors: Iterable[torch.Tensor | None], device: torch.device) -> None:
    """Refuse tensors elsewhere: kernels that read addresses from a table cannot tell.

    Raises:
        ValueError: A tensor is on another device.
    """
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"a tensor is on {tensor.device}, expected the device of the first weight, {device}"
            )


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Hold the scratch memory and make the device the current one."""
    with _LOCK:
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield


def stream_of(device: torch.device) -> int:
    """Return the current stream: memory that one stream fills is not another's to read."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def scratch(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return uninitialised memory, at a fixed address while that is big enough.

    It belongs to the current stream of the device, and is the caller's inside `launching`. A CUDA
    graph that is being captured gets memory of its own.
    """
    if _capturing(device):
        return torch.empty(shape, dtype=dtype, device=device)
    key = (device, stream_of(device))
    needed = math.prod(shape) * dtype.itemsize
    size = _buffers[key].numel() if key in _buffers else 0
    if size < needed or not size:
        length = max(_LEAST, 2 * size, needed)
        _buffers[key] = torch.empty(length, dtype=torch.uint8, device=device)
    return _buffers[key][:needed].view(dtype).view(shape)


def keep_for_graph(device: torch.device, *tables: object) -> None:
    """Keep what a CUDA graph that is being captured reads: it may be replayed at any time."""
    if _capturing(device):
        _captured.append(tables)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def table(rows: Sequence[Sequence[int]], columns: int, device: torch.device) -> torch.Tensor:
    """Return numbers as int64 [rows, columns] on the device."""
    result = torch.empty(len(rows), columns, dtype=torch.int64, device=device)
    send([value for row in rows for value in row], result)
    return result


class Filled:
    """Memory that the current stream has filled, and others read.

    Args:
        device: Where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {stream_of(device)}
        if device.type == "cuda":
            new_event: Any = torch.cuda.Event
            self._event = new_event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Let the current stream wait, once, until it is filled; the host does not."""
        # Before a capture begins, torch.cuda.graph waits for all that was queued.
        if stream_of(self._device) in self._streams or _capturing(self._device):
            return
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._streams.add(stream_of(self._device))


class Addresses:
    """Tables of addresses on a device; the last few are found again, and none is ever changed.

    Tensors that come and go mostly do so at the same few addresses.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[int, tuple[tuple[int, ...], ...]], torch.Tensor]
        self._tables = OrderedDict()

    def of(self, rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
        """Return rows, at least one, as int64 [rows, columns] on the device."""
        key = stream_of(device), rows
        found = self._tables.pop(key, None)
        if found is None:
            found = table(rows, len(rows[0]), device)
        self._tables[key] = found
        if len(self._tables) > _ADDRESS_TABLES:
            self._tables.popitem(last=False)
        return found


def send(values: Sequence[float], out: torch.Tensor) -> None:
    """Write numbers to a tensor on the device; the host does not wait.

    Raises:
        RuntimeError: A CUDA graph is being captured: its replays would read memory of the host.
    """
    if _capturing(out.device):
        raise RuntimeError(
            "a CUDA graph is being captured and tables of addresses are not on the GPU yet, "
            "expected a call with the same tensors before: warm up on the stream of the capture, "
            "with gradients in the layout of their weights"
        )
    on_gpu = out.device.type == "cuda"
    source = torch.tensor(values, dtype=out.dtype, pin_memory=on_gpu)
    out.view(-1).copy_(source, non_blocking=True)
