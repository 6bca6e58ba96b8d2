"""How Triton kernels are launched: tiles, splits, scratch memory, the package around them."""

import pytest
import torch
import triton

from fastplastic.kernels.gpu import launch
from fastplastic.kernels.gpu import layout as _triton_layout
from fastplastic.kernels.gpu import runtime as _triton_runtime
from fastplastic.kernels.gpu.functions import flat_ends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("units", [1, 3, 37, 64, 100, 768, 5000])
@pytest.mark.parametrize("positions", [1, 49, 196, 3136, 100_000])
@pytest.mark.parametrize("units_adjacent", [True, False])
def test_every_position_is_read_by_one_program(units, positions, units_adjacent):
    tile = launch.stats_tile(units, positions, 4, units_adjacent)
    assert tile.units * tile.positions <= 512
    for outer in (1, 7, 1000):
        split = launch.stats_split(tile, units, positions, outer)
        blocks = triton.cdiv(positions, tile.positions)
        assert split.unit_blocks == triton.cdiv(units, tile.units)
        assert split.inner_splits == triton.cdiv(blocks, split.blocks)
        assert split.splits == split.inner_splits * triton.cdiv(outer, split.outer)
        # Counts are exact in float32, and sums are not deep.
        assert split.outer * split.blocks <= 512


@pytest.mark.parametrize(
    ("x", "axis", "width"),
    [
        # Whole vectors everywhere; rows of 37; planes of 7 x 7 and of 8 x 8; a step of 2.
        (torch.empty(6, 64), 1, 4),
        (torch.empty(6, 64, dtype=torch.bfloat16), 1, 8),
        (torch.empty(6, 37), 1, 1),
        (torch.empty(2, 8, 7, 7), 1, 1),
        (torch.empty(2, 8, 8, 8), 1, 4),
        (torch.empty(2, 8, 7, 7).contiguous(memory_format=torch.channels_last), 1, 4),
        (torch.empty(6, 64)[:, ::2], 1, 1),
    ],
)
def test_vector_width(x, axis, width):
    assert _triton_layout.layout(x, axis).vector == width


def test_devices_are_compared():
    with pytest.raises(ValueError, match=r"on cpu, expected the device .* cuda:1"):
        _triton_runtime.check_devices([None, torch.empty(1)], torch.device("cuda", 1))


def test_scratch_memory_stays_where_it_is():
    device = torch.device(DEVICE)
    small = _triton_runtime.scratch(device, (2, 3))
    assert small.shape == (2, 3) and small.dtype == torch.float32
    assert _triton_runtime.scratch(device, (4, 4)).data_ptr() == small.data_ptr()
    size = 2 * small.untyped_storage().nbytes()
    large = _triton_runtime.scratch(device, (size,), torch.uint8)
    assert large.numel() == size
    assert _triton_runtime.scratch(device, (2, 3)).data_ptr() == large.data_ptr()


def test_flat_ends_are_float32_inside_the_intervals():
    assert flat_ends("hardswish") == {
        "FLAT_BELOW": -3.0, "FLAT_FROM": pytest.approx(-1.53), "FLAT_TO": pytest.approx(-1.47),
        "FLAT_ABOVE": None,
    }  # fmt: skip
    assert flat_ends("hardswish")["FLAT_FROM"] >= -1.53
    assert flat_ends("hardswish")["FLAT_TO"] <= -1.47
    assert set(flat_ends("identity").values()) == {None}
