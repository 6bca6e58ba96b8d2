"""How Triton kernels are launched: tiles, splits, scratch memory, the package around them."""

import pytest
import torch

from fastplastic.kernels.gpu import layout as _triton_layout
from fastplastic.kernels.gpu import runtime as _triton_runtime
from fastplastic.kernels.gpu import unit_tables
from fastplastic.kernels.gpu.functions import flat_ends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def form(x, axis=1, activation="relu"):
    return unit_tables.Form(tuple(x.shape), x.stride(), axis, x.dtype, True, activation, False)


def items_of(x, axis):
    """The table of the tensor and those of its items and folds, in CPU memory."""
    tables = unit_tables.tables_for((form(x, axis),), (0,), 9, torch.device(DEVICE))
    row = unit_tables.Row(*tables.tensors[0].tolist())
    return row, tables.items.tolist(), tables


SHAPES = [(1, 1, 1), (37, 3, 100_000), (5, 64, 49), (7, 37, 196), (1000, 100, 1), (3, 768, 3136)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("units_adjacent", [True, False])
def test_every_position_is_read_by_one_program(shape, dtype, units_adjacent):
    a, units, b = shape
    strides = (units * b, 1, units) if units_adjacent else (units * b, b, 1)
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    row, items, _ = items_of(x, 1)
    seen = {}
    for tensor, unit, start, turn, outers, begin, end, split in items:
        assert tensor == 0 and 0 <= split < row.splits
        assert turn == 1 and start % max(row.outer_stride, 1) == 0
        tiles = outers * -(-(end - begin) // 16)
        # Counts are exact in 10 bits, and sums are not deep.
        assert 0 < tiles < 1024
        seen.setdefault(unit, []).append((start, begin, outers * (end - begin)))
    assert len(seen) == len(range(0, units, min(seen.keys() - {0}, default=units)))
    for parts in seen.values():
        assert len({part[:2] for part in parts}) == len(parts) == row.splits
        assert sum(count for _, _, count in parts) == a * b


def test_a_tensor_is_read_the_same_way_beside_others():
    """So that its sums have the same bits, whatever waits with it."""
    small, large = torch.empty(4096, 64, device="meta"), torch.empty(1 << 22, 64, device="meta")
    _, alone, _ = items_of(small, 1)
    tables = unit_tables.tables_for((form(small), form(large)), (0, 64), 9, torch.device(DEVICE))
    items = tables.items.tolist()
    assert [item for item in items if item[0] == 0] == alone
    assert len(items) > 2 * len(alone)


@pytest.mark.parametrize("batch", [8, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_sums_are_little_beside_what_is_read(batch, dtype):
    """The layers of ResNet-50 at 224 pixels, channels_last."""
    shapes = {
        (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14),
        (1024, 14), (512, 14), (512, 7), (2048, 7),
    }  # fmt: skip
    for channels, size in shapes:
        shape = (batch, channels, size, size)
        x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        row, _, tables = items_of(x, 1)
        read, written = x.numel() * x.itemsize, tables.parts * 9 * 4
        # Of 8 images of 7 x 7 there is one split.
        assert row.splits == 1 or written <= 0.05 * read, (shape, row.splits, written / read)


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
    assert _triton_layout.layout(x.shape, x.stride(), axis).vector(x.itemsize) == width


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


def test_flat_ends_are_numbers_inside_the_intervals():
    assert flat_ends("hardswish") == {
        "FLAT_BELOW": -3.0, "FLAT_FROM": pytest.approx(-1.53), "FLAT_TO": pytest.approx(-1.47),
        "FLAT_ABOVE": None,
    }  # fmt: skip
    assert flat_ends("hardswish")["FLAT_FROM"] >= -1.53
    assert flat_ends("hardswish")["FLAT_TO"] <= -1.47
    assert set(flat_ends("identity").values()) == {None}
    for dtype in (torch.bfloat16, torch.float16):
        for name, end in flat_ends("hardswish", dtype).items():
            if end is None or end == -3:
                continue
            near = torch.tensor(end, dtype=dtype)
            assert near.item() == end and -1.53 <= end <= -1.47, (name, end)
            outside = near.view(torch.int16) + (1 if name == "FLAT_FROM" else -1)
            assert not -1.53 <= outside.view(dtype).item() <= -1.47
