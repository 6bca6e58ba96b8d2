"""Merged dimensions name the same elements in the same order, in every operand."""

import itertools

import pytest
import torch

from fastplastic.kernels.strides import merged, pieces_of, slowest_first, stretch_of, unit_views


def offsets(dimensions, operand):
    """Return where the elements are in an operand, the first dimension slowest."""
    steps = [[i * way[1 + operand] for i in range(way[0])] for way in dimensions]
    return [sum(at) for at in itertools.product(*steps)]


X = torch.arange(2 * 3 * 4 * 5)
# In one stretch, permuted, a crop, expanded, with dimensions of size 1, a step, no dimension.
TENSORS = {
    "planes": X.view(2, 3, 4, 5),
    "channels_last": X.view(2, 4, 5, 3).permute(0, 3, 1, 2),
    "crop": X.view(2, 3, 4, 5)[:, :, 1:3, :4],
    "expanded": X[:6].view(2, 3, 1, 1).expand(2, 3, 4, 5),
    "ones": X.view(6, 1, 20)[:, :, ::2],
    "scalar": X[0],
}


@pytest.mark.parametrize("name", TENSORS)
def test_merged_dimensions_name_the_same_elements(name):
    x = TENSORS[name]
    other = torch.empty(x.shape).stride()
    ways = [(x.shape[d], x.stride(d), other[d]) for d in slowest_first(x)]
    found = merged(ways)
    for operand in (0, 1):
        assert offsets(found, operand) == offsets(ways, operand)
    assert all(way[0] != 1 for way in found)


def test_what_is_one_stretch_becomes_one_dimension():
    assert merged([(2, 60), (3, 20), (4, 5), (5, 1)]) == [(120, 1)]
    # Only one of two operands is one stretch.
    assert merged([(2, 60, 3), (60, 1, 0)]) == [(2, 60, 3), (60, 1, 0)]
    assert stretch_of([(2, 6), (3, 2)]) == (6, 2)
    assert stretch_of([(1, 7), (1, 9)]) == stretch_of([]) == (1, 1)
    assert stretch_of([(2, 60), (3, 10)]) is None


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "scalar"])
@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_pieces_hold_every_element_of_a_unit_once(name, limit):
    x = TENSORS[name]
    expected = [sorted(part.flatten().tolist()) for part in x.movedim(1, 0)]
    for cut in (pieces_of((x,), 1, limit), ((a, (b,)) for a, b in unit_views(x, 1))):
        found = [[] for _ in expected]
        for start, (piece,) in cut:
            for unit in range(piece.shape[1]):
                found[start + unit] += piece[:, unit].flatten().tolist()
        assert [sorted(values) for values in found] == expected
