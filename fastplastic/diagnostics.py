"""How many directions the activations of a layer use: three ranks, from the singular values.

Names clash in the literature, so here are the formulas. sigma_1 >= sigma_2 >= ... are the singular
values of the matrix A [positions, units] of activations h = f(z), which is not centred.

    effective rank  exp(H(p)), p = sigma / sum sigma, H(p) = -sum p ln p  (Roy and Vetterli 2007)
    srank           least k with sum of the first k sigma >= 0.99 sum sigma  (Kumar et al. 2021)
    stable rank     |A|_F^2 / |A|_2^2 = sum sigma^2 / sigma_1^2

All are counts of directions, without a unit, at most min(positions, units), and do not change when
A is multiplied by a number. For A of zeros alone the formulas are 0 / 0: all three are 0 then, as
the rank of such a matrix is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastplastic.errors import InputError

# The share of sum sigma that srank may leave out: delta of Kumar et al., who use this value too.
DELTA = 0.01


@dataclass(frozen=True)
class Ranks:
    """The ranks of one layer's activations on a sample of positions.

    Attributes:
        effective_rank: exp of the entropy of sigma / sum sigma.
        srank: How many singular values it takes for 99 % of their sum.
        stable_rank: sum sigma^2 / max sigma^2.
        rows: Positions in the sample.
        units: Units, the columns of the matrix.
    """

    effective_rank: float
    srank: int
    stable_rank: float
    rows: int
    units: int


def effective_rank(sigma: Tensor) -> float:
    """Return exp(-sum p ln p) with p = sigma / sum sigma.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        sigma: Singular values, floating point [n], in any order and any unit.

    Returns:
        A number of directions in [1, n]; 0 where all of sigma is 0 or n is 0.

    Raises:
        InputError: `sigma` has another shape or type, or values that are negative or not finite.
    """
    share = _checked(sigma)
    if not share.any():
        return 0.0
    # xlogy is 0 at 0, as the entropy is.
    share = share / share.sum()
    return float(torch.special.xlogy(share, share).sum().neg().exp())


def srank(sigma: Tensor) -> int:
    """Return the least k with sigma_1 + ... + sigma_k >= 0.99 sum sigma.

    srank_delta with delta = 0.01 of Kumar et al., "Implicit under-parameterization inhibits
    data-efficient deep reinforcement learning", ICLR 2021, arXiv 2010.14498.

    Args:
        sigma: Singular values, floating point [n], in any order and any unit.

    Returns:
        A number of directions in 1..n; 0 where all of sigma is 0 or n is 0.

    Raises:
        InputError: `sigma` has another shape or type, or values that are negative or not finite.
    """
    largest = _checked(sigma)
    if not largest.any():
        return 0
    sums = largest.cumsum(0)
    return int((sums < (1 - DELTA) * sums[-1]).sum()) + 1


def stable_rank(sigma: Tensor) -> float:
    """Return sum sigma^2 / max sigma^2, the squared Frobenius by the squared spectral norm.

    Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54 (2007), arXiv math/0503442,
    where it is called the numerical rank.

    Args:
        sigma: Singular values, floating point [n], in any order and any unit.

    Returns:
        A number of directions in [1, n]; 0 where all of sigma is 0 or n is 0.

    Raises:
        InputError: `sigma` has another shape or type, or values that are negative or not finite.
    """
    return float(_checked(sigma).square().sum())


def ranks_of(matrix: Tensor) -> Ranks:
    """Return the three ranks of a matrix of activations.

    Args:
        matrix: floating point [rows, units], computed with in float64.

    Raises:
        InputError: `matrix` has another shape or type, or values that are not finite.
    """
    _check(matrix, "the matrix", ("rows", "units"))
    sigma = singular_values(matrix)
    return Ranks(effective_rank(sigma), srank(sigma), stable_rank(sigma), *matrix.shape)


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix in descending order, float64 [min(rows, units)]."""
    wide = matrix.detach().double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    # R has the same singular values, and is several times as quick where the matrix is oblong.
    sigma: Tensor = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    return sigma


def _checked(sigma: Tensor) -> Tensor:
    """Return singular values in float64, the largest first and as 1 (unless it is 0)."""
    _check(sigma, "sigma", ("n",))
    if sigma.numel() and float(sigma.min()) < 0:
        raise InputError(
            f"sigma has {float(sigma.min()):g}, expected no value below 0: pass singular values, "
            "not eigenvalues"
        )
    # Relative to the largest, no square is out of range.
    ordered = sigma.detach().double().sort(descending=True).values
    return ordered / ordered[0] if ordered.any() else ordered


def _check(value: Tensor, name: str, axes: tuple[str, ...]) -> None:
    if not isinstance(value, Tensor) or value.ndim != len(axes) or not value.is_floating_point():
        is_tensor = isinstance(value, Tensor)
        found = f"{value.dtype} {tuple(value.shape)}" if is_tensor else type(value).__name__
        shape = f"({', '.join(axes)}{',' * (len(axes) == 1)})"
        raise InputError(f"{name} is {found}, expected a floating-point tensor {shape}: convert it")
    if not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise InputError(
            f"{name} has {bad} of {value.numel()} values that are NaN or infinite, expected finite "
            "ones: leave out the rows that have some"
        )
