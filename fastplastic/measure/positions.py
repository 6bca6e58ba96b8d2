"""Read a tensor at a random sample of its positions instead of all of them.

A position is one index of all dimensions but that of the units: a pixel of an image, a token, a
sample of a linear layer. Those that are read are drawn uniformly and without replacement, anew in
each call of the model, so means are unbiased. With k of N positions, their standard error is
sqrt((1 - k / N) / k) of the standard deviation over the N (Cochran, "Sampling Techniques", 1977,
theorem 2.2). What is drawn depends on the seed, the call and N alone: neither on the order of
hooks nor on the device, and the global random state is neither read nor changed.
"""

import torch
from torch import Tensor

from fastplastic.errors import InputError
from fastplastic.measure.compiled import POSITIONS, in_compiled_call
from fastplastic.measure.padding import Tokens, unpadded
from fastplastic.measure.sums import reading
from fastplastic.processes import Processes
from fastplastic.randomness import stream

# Up to how many times the limit a tensor is read whole, since picking would take longer. An element
# that is picked took 2 to 3 times as long as in a read of all, and 27 times where the units of a
# position do not lie side by side (NCHW): each is in a cache line of its own (float32, one core;
# reads of all share two).
_BESIDE, _APART = 3, 64


class PositionSample:
    """Picks at which positions tensors are read.

    Args:
        limit: At how many of each tensor with many more; None for all.
        seed: Any integer.

    Attributes:
        largest: Positions of the largest tensor that was not read whole; 0 for none.

    Raises:
        InputError: The limit is not a positive integer.
    """

    def __init__(self, limit: int | None = None, seed: int = 0) -> None:
        whole = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (whole and limit > 0):
            raise InputError(
                f"sample_positions is {limit!r}, expected a positive integer: leave it out to read "
                "all positions"
            )
        self.limit, self._seed = limit, seed
        self._rank, self._size = 0, 1
        # Of one call: (number of positions, device) -> those that are read.
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}
        self._memory: dict[torch.dtype, Tensor] = {}
        self.restart()

    def restart(self, step: int = 0) -> None:
        """Forget what was read, and draw as at the start of this step of a training."""
        self._step, self._call, self.largest = step, 0, 0
        self._drawn.clear()

    def among(self, processes: Processes) -> None:
        """Draw as one process would that runs the calls of all of them in turns."""
        self._rank, self._size = processes.rank, processes.size

    def begin(self) -> None:
        """Draw anew for the next call of the model."""
        self._call += 1
        self._drawn.clear()

    @property
    def obstacle(self) -> str | None:
        """Why compiled code cannot read what is picked; None where all is."""
        return None if self.limit is None else POSITIONS

    def check_eager(self, *, measured: bool) -> None:
        """Raise InputError where a call that is measured runs as compiled code, and has to draw."""
        if self.limit is not None and measured and in_compiled_call():
            raise InputError(POSITIONS)

    def pick(self, x: Tensor, axis: int, tokens: Tokens | None) -> tuple[Tensor, int]:
        """Return what is read of a tensor, and its axis.

        Args:
            x: Pre-activations or gradients, any shape and strides.
            axis: Dimension of the channels.
            tokens: The tokens that are no padding; None for all.

        Returns:
            [limit, channels] and 1 for a sample, which stays as it is until the next is picked; or
            all positions without padding, where picking would take longer than to read them.
        """
        if self.limit is None:
            return unpadded(x, axis, tokens)
        padded = tokens is not None and tokens.fit(x, axis)
        units = x.shape[axis]
        n = len(tokens.positions) if tokens and padded else x.numel() // max(units, 1)
        near = x.stride(axis) == 1 or units == 1
        if n <= self.limit * (_BESIDE if near else _APART):
            return unpadded(x, axis, tokens)
        self.largest = max(self.largest, n)
        chosen = self._choose(n, x.device)
        if tokens and padded:
            chosen = tokens.positions.index_select(0, chosen)
        rows = x.movedim(axis, -1)
        if not rows.is_contiguous():
            return rows[torch.unravel_index(chosen, rows.shape[:-1])], 1
        out = self._buffer(len(chosen), units, x) if x.device.type == "cpu" else None
        return torch.index_select(rows.flatten(0, -2), 0, chosen, out=out), 1

    def _buffer(self, rows: int, units: int, like: Tensor) -> Tensor:
        """Return memory for [rows, units] on the CPU, which the next pick is written to, too.

        Into fresh memory of 25 MB, picking took twice as long.
        """
        found = self._memory.get(like.dtype)
        if found is None or len(found) < rows * units:
            with reading():
                found = self._memory[like.dtype] = torch.empty(rows * units, dtype=like.dtype)
        return found[: rows * units].view(rows, units)

    def _choose(self, n: int, device: torch.device) -> Tensor:
        """Return `limit` of n positions, int64, ascending: of one call always the same."""
        found = self._drawn.get((n, device))
        if found is None:
            call = (self._call - 1) * self._size + self._rank + 1
            draws = stream(self._seed, "positions", f"{self._step} {call} {n}")
            chosen = draws.choice(n, self.limit, replace=False, shuffle=False)
            chosen.sort()
            found = self._drawn[n, device] = torch.from_numpy(chosen).to(device)
        return found

    def notes(self, largest: int | None = None) -> tuple[str, ...]:
        """Return what a reader of the numbers has to know; nothing where all was read.

        Args:
            largest: As `largest`, of all processes; by default of this one.
        """
        largest = self.largest if largest is None else largest
        if self.limit is None or not largest:
            return ()
        error = ((1 - self.limit / largest) / self.limit) ** 0.5
        return (
            f"tensors with many positions were read at {self.limit:,} of them in each step, drawn "
            f"at random (sample_positions; the largest has {largest:,}): the standard error "
            f"of a mean of one step is up to {error:.1%} of the spread, minima and maxima are "
            "bounds, and a unit that is active at a share p of the positions seems dead or frozen "
            "with probability (1 - p)^n where n of them were read",
        )
