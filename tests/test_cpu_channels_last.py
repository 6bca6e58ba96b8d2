"""Gradients of contiguous convolutions that lie channels last, as compiled code gives them."""

import pytest
import torch
from helpers import NUMBA as cpu
from helpers import REFERENCE as reference
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Notes which functions of torch are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# One piece of a line, several that end within a unit, groups, one row, a kernel that is no square.
SHAPES = {
    "one piece": ((33, 17, 3, 3), 1),
    "several pieces": ((37, 500, 3, 3), 1),
    "groups": ((24, 5, 3, 3), 4),
    "one row": ((1, 6, 2, 2), 1),
    "no square": ((9, 7, 1, 5), 1),
}


def pair(shape, dtype):
    torch.manual_seed(0)
    weight, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return weight, gradient.contiguous(memory_format=torch.channels_last)


def check(weight, gradient, groups):
    found = cpu.parameter_stats([weight], [gradient], [groups])
    expected = reference.parameter_stats([weight], [gradient], [groups])
    for table, other in zip(found, expected, strict=True):
        # Sums of products cancel, so they are compared with the largest of their row.
        scale = other.abs().amax(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(table / scale, other / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SHAPES)
def test_they_are_read_along_with_the_weight(kind, dtype):
    shape, groups = SHAPES[kind]
    check(*pair(shape, dtype), groups)


@pytest.mark.parametrize("kind", SHAPES)
def test_those_that_are_not_finite_count_where_they_are(kind):
    shape, groups = SHAPES[kind]
    weight, gradient = pair(shape, torch.float32)
    gradient[0, 0, 0, 1] = torch.nan
    gradient[-1, -1, -1, -1] = torch.inf
    gradient[-1, shape[1] // 2, 0, 0] = -torch.inf
    check(weight, gradient, groups)


def test_they_are_not_copied():
    weight, gradient = pair((16, 8, 3, 3), torch.float32)
    out = cpu.parameter_stats([weight], [gradient])
    with Calls() as calls:
        cpu.parameter_stats([weight], [gradient], out=out)
    assert not calls.names & {"copy_", "clone", "empty_like", "contiguous"}
