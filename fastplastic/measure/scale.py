"""Gradients under a factor on the loss, as of a GradScaler."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastplastic.stats import COLUMN_STATISTICS, GRADIENT_STATISTICS, ROW_STATISTICS

# Returns the factor on the loss of the step to come, as a number or as a scalar on the device.
LossScale = Callable[[torch.device], float | Tensor]

# How each sum of gradients grows with the scale of the loss; counts of gradients do not.
_POWER_OF_SCALE = {
    "sum_abs_g": 1, "sum_sq_g": 2, "sum_abs_dw": 1, "sum_sq_dw": 2, "sum_abs_w_dw": 1,
    "sum_w_out_dw_out": 1,
    "n_g": 0, "n_nonfinite_g": 0, "n_dw": 0, "n_nonfinite_dw": 0, "n_dw_out": 0,
    "n_nonfinite_dw_out": 0,
}  # fmt: skip
_TABLES = (GRADIENT_STATISTICS, ROW_STATISTICS, COLUMN_STATISTICS)
# The last row of each table counts what is not finite.
assert all(names[-1].startswith("n_nonfinite") for names in _TABLES)


class ScaledSums:
    """Adds up sums of gradients step by step, each without the factor on its loss.

    All is computed on the device: the host does not wait to know whether a step overflowed.

    Args:
        step: The tables that a step adds to, float64 [statistics, slots]: of gradients, of rows and
            of columns of weights.

    Attributes:
        total: The sums of all steps that ended, in tables of the same shapes.
        dropped: How many steps were left out, int64 scalar.
    """

    def __init__(self, step: Sequence[Tensor]) -> None:
        self._step = step
        self.total = [torch.zeros_like(table) for table in step]
        device = step[0].device
        self.dropped = torch.zeros((), dtype=torch.int64, device=device)
        powers = [[_POWER_OF_SCALE.get(name, 0) for name in names] for names in _TABLES]
        stays = [[name not in _POWER_OF_SCALE for name in names] for names in _TABLES]
        self._powers = [_column(rows, torch.float64, device) for rows in powers]
        self._stays = [_column(rows, torch.bool, device) for rows in stays]

    def clear(self) -> None:
        """Forget all steps that ended."""
        for tensor in (*self.total, self.dropped):
            tensor.zero_()

    def bad(self, factor: float | Tensor) -> Tensor:
        """Return how many gradients of the step are not finite, or cannot be divided by the factor.

        Returns:
            float64 scalar on the device.
        """
        counts = [table[-1].sum() for table in self._step]
        if isinstance(factor, Tensor):
            pairs = zip(self._step, self._stays, strict=True)
            seen = [((table != 0) & ~stays).any() for table, stays in pairs]
            counts.append(torch.stack(seen).any() & ~(factor > 0))
        return sum(counts[1:], start=counts[0])

    def end_step(self, factor: float | Tensor, bad: Tensor) -> None:
        """Add the sums of a step to the total, and clear them.

        Args:
            factor: The factor on its loss.
            bad: How many gradients are not finite, on all devices: none is added unless it is 0.
        """
        keep = bad == 0
        for table, total, power, stays in zip(
            self._step, self.total, self._powers, self._stays, strict=True
        ):
            # Dividing by a power of two leaves every bit as it is.
            total += (table / factor**power).where(keep | stays, 0)
            table.zero_()
        self.dropped += ~keep


def _column(rows: list[int] | list[bool], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=device)[:, None]
