"""Sums over the rows or columns of tensors that several processes may hold parts of."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from fastplastic.errors import InputError
from fastplastic.model.spread import Part, local_of, part_of
from fastplastic.processes import Processes, all_processes

# How many elements are held in float64 at once.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Lines:
    """The rows or columns of a tensor, or the columns of each of the groups that its rows form.

    Their sums are the same bits in whatever order they are made, so however the tensor is cut over
    processes. What is added up is rounded first, to multiples of a unit so large that float64 holds
    every sum of them exactly. After Demmel and Nguyen, "Fast reproducible floating-point
    summation", ARITH 2013.

    Attributes:
        name: What errors call the tensor.
        tensor: Of one dimension or more.
        dim: The dimension that runs over lines, 0 or 1.
        groups: Into how many parts its rows are split; only of columns.
        live: bool, which elements count, in the shape of the part that this process holds; None for
            all.
    """

    name: str
    tensor: Tensor
    dim: int
    groups: int = 1
    live: Tensor | None = None

    def sums(self, power: int, centre: float = 0.0) -> Tensor:
        """Return the sum of (x - centre)^power along each line, float64 [groups, lines].

        Where the tensor is cut, all processes have to call this, and each gets the same.

        Raises:
            InputError: Others hold parts of the tensor, and this process works alone.
        """
        part = part_of(self.name, self.tensor)
        together = self._together(part)
        most = self._most(part, together)
        count = self.tensor.numel() / max(most.numel(), 1)
        anchor = _anchor(count * (most + abs(centre)) ** power)
        totals = torch.zeros_like(most)
        here = self._here(part)
        # Of processes that hold the same, one adds it.
        for group, block, live in self._blocks(part) if part.first else ():
            own = anchor[group, here].to(block.device)[:, None]
            terms = (block.double() - centre) ** power
            terms = terms if live is None else terms.masked_fill(~live, 0.0)
            totals[group, here] += ((terms + own) - own).sum((0, 2)).cpu()
        if together is not None:
            together.add_(totals)
        return totals

    def weigh(self, factors: Tensor) -> Tensor:
        """Return the sum over all lines of elements times factors, float64 [other dimension].

        Where the tensor is cut, all processes have to call this, and each gets the same.

        Args:
            factors: float64 [groups, lines, dimensions after the second], 1 where all have one.

        Raises:
            InputError: Others hold parts of the tensor, and this process works alone.
        """
        part = part_of(self.name, self.tensor)
        together = self._together(part)
        sums = torch.zeros(part.shape[1 - self.dim], dtype=torch.float64)
        at, here = part.offsets[1 - self.dim], self._here(part)
        for group, block, _ in self._blocks(part) if part.first else ():
            own = factors[group, here].to(block.device)
            sums[at : at + len(block)] = (block.double() * own).sum((1, 2)).cpu()
            at += len(block)
        if together is not None:
            together.add_(sums)
        return sums

    def spread(self, table: Tensor) -> Tensor:
        """Return a table [groups, lines] as factors of the elements that this process holds."""
        part = part_of(self.name, self.tensor)
        own = table[:, self._here(part)].to(local_of(self.tensor).device)
        if self.groups > 1:
            own = own[self._group_of_row(part).to(own.device)]
        elif self.dim == 0:
            own = own.T
        shape = [*own.shape[: len(part.shape)], *[1] * (len(part.shape) - 2)]
        return own.reshape(shape).expand(part.sizes)

    def _most(self, part: Part, together: Processes | None) -> Tensor:
        """Return the largest size of any element of each line."""
        most = torch.zeros(self.groups, part.shape[self.dim], dtype=torch.float64)
        here = self._here(part)
        for group, block, live in self._blocks(part):
            sizes = block.abs() if live is None else block.abs().masked_fill(~live, 0.0)
            if sizes.numel():
                own = sizes.amax((0, 2)).double().cpu()
                most[group, here] = torch.maximum(most[group, here], own)
        if together is not None:
            most.neg_()
            together.least_(most)
            most.neg_()
        return most

    def _here(self, part: Part) -> slice:
        begin = part.offsets[self.dim]
        return slice(begin, begin + part.sizes[self.dim])

    def _group_of_row(self, part: Part) -> Tensor:
        rows = torch.arange(part.offsets[0], part.offsets[0] + part.sizes[0])
        return rows // max(part.shape[0] // self.groups, 1)

    def _blocks(self, part: Part) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield the elements that this process holds, [other, line, rest], group by group."""
        values = self._laid_out(local_of(self.tensor.detach()))
        live = None if self.live is None else self._laid_out(self.live.to(values.device))
        if self.groups == 1:
            rows_of = [(0, len(values))]
        else:
            counts = self._group_of_row(part).bincount(minlength=self.groups).tolist()
            rows_of = list(enumerate(counts))
        step = max(_CHUNK // max(values[:1].numel(), 1), 1)
        begin = 0
        for group, count in rows_of:
            for at in range(begin, begin + count, step):
                chunk = slice(at, min(at + step, begin + count))
                yield group, values[chunk], None if live is None else live[chunk]
            begin += count

    def _laid_out(self, values: Tensor) -> Tensor:
        if values.dim() == 1:
            return values[None, :, None]
        values = values.movedim(self.dim, 1)
        return values.flatten(2) if values.dim() > 2 else values[..., None]

    def _together(self, part: Part) -> Processes | None:
        """Return the processes to add up with; None where each has all of the tensor."""
        if not part.cut:
            return None
        together = all_processes()
        if together is None:
            raise InputError(
                f"{self.name!r} is cut over processes, and one alone does not know what the others "
                "hold: call this in all of them, not in `with alone()`"
            )
        return together


def _anchor(bounds: Tensor) -> Tensor:
    """Return what values are rounded by, by adding and subtracting it.

    Args:
        bounds: No sum of them is larger than this.
    """
    # 2^-52 of this is the unit of the rounded values.
    exponents = numpy.frexp(bounds.numpy())[1]
    return torch.from_numpy(numpy.ldexp(1.5, exponents + 1))
