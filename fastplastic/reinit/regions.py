"""What a plan means for the tensors of a model: regions to write, all checked beforehand.

A plan may have been edited by hand, and its wiring says where to write, so every index is compared
with the tensor it points into. Nothing is written here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastplastic.errors import FileError, InputError
from fastplastic.initial import Target
from fastplastic.kernels import DTYPES
from fastplastic.model import check_built, is_spread, part_of
from fastplastic.planning import Plan
from fastplastic.reinit.places import Elements, FillWrite, Region
from fastplastic.wiring import Consumer, Norm, UnitLayer

# What a norm holds per channel, and the value that makes it the identity.
_NORM_VALUES = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


class Tensors:
    """The parameters and buffers of a model by name."""

    def __init__(self, model: nn.Module) -> None:
        check_built(model, spread=True)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = parameters.keys()
        self._all = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        self._names_at: dict[int | tuple[str, int], list[str]] = {}
        for name, tensor in self._all.items():
            self._names_at.setdefault(_address(tensor), []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that may be written; an error when there is none or it is shared."""
        if name not in self._all:
            raise FileError(
                f"the plan writes to {name!r}, which is no parameter or buffer of the model "
                "(computed weights cannot be re-initialised): plan again with this model"
            )
        tensor = self._all[name]
        sharing = [other for other in self._names_at[_address(tensor)] if other != name]
        if sharing:
            raise InputError(
                f"{name!r} shares its values with {sharing[0]!r}, expected a tensor of its own: "
                "exclude its layer from the plan"
            )
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"{name!r} has dtype {tensor.dtype}, expected a floating-point dtype: "
                "re-initialise before quantising"
            )
        return tensor


def _address(tensor: Tensor) -> int | tuple[str, int]:
    """Return by what tensors that share their values are known."""
    # Tensors without elements have no address, nor have DTensors, which are shared as they are.
    spread = is_spread(tensor)
    return ("id", id(tensor)) if spread or not tensor.numel() else tensor.data_ptr()


def selected_elements(tensors: Tensors, plan: Plan) -> list[Elements]:
    """Return the elements that the masks of a plan select.

    Raises:
        FileError: A mask is no mask of the parameter.
        InputError: A parameter is shared with another layer or not floating-point.
    """
    for name, mask in plan.masks.items():
        shape = part_of(name, tensors[name]).sizes
        if mask.dtype != torch.bool or mask.shape != shape:
            raise FileError(
                f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                f"{shape}: plan again with this model"
            )
        if name not in tensors.parameters:
            raise FileError(f"{name!r} is a buffer, expected a parameter: correct the plan")
    counts = plan.counts
    return [Elements(name, mask, counts[name]) for name, mask in plan.masks.items()]


def selected_rows(plan: Plan) -> dict[str, Tensor]:
    """Return layer name -> rows to draw afresh, int64 ascending: selected units and coupled rows.

    Raises:
        FileError: A unit or row is out of range, named twice, or not one that may be written.
        InputError: The weight of a layer is transformed before use.
    """
    chosen: dict[str, Tensor] = {}
    for name, units in plan.units.items():
        layer = _layer(plan, name)
        _check_units(layer, units)
        _mark(chosen, layer, units)
        for member in layer.coupled:
            if len(member.row_of_unit) != layer.n_units:
                raise FileError(
                    f"{len(member.row_of_unit)} rows of {member.name!r} are coupled to {name!r}, "
                    f"expected {layer.n_units}: plan again with this model"
                )
            rows = member.row_of_unit[units]
            _mark(chosen, _layer(plan, member.name), rows[rows >= 0])
    return {name: mask.nonzero().flatten() for name, mask in chosen.items()}


def _layer(plan: Plan, name: str) -> UnitLayer:
    if name not in plan.wiring:
        raise FileError(f"layer {name!r} is not in the plan's wiring: plan again with this model")
    layer = plan.wiring[name]
    if layer.transformed:
        raise InputError(
            f"the weight of {name!r} is transformed before use, so what is written does not hold: "
            "exclude the layer from the plan"
        )
    return layer


def _check_units(layer: UnitLayer, units: Tensor) -> None:
    _check_range(f"units of {layer.name!r}", units, layer.n_units)
    if len(torch.unique(units)) < len(units):
        raise FileError(f"units of {layer.name!r} are named twice, expected once: correct the plan")
    if len(layer.hidden) != layer.n_units or not layer.hidden[units].all():
        raise FileError(
            f"units of {layer.name!r} are not hidden, expected units that only consumers read: "
            "correct the plan"
        )


def _check_range(what: str, index: Tensor, stop: int, low: int = 0) -> None:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise FileError(f"{what} are not a list of int64 indices: plan again with this model")
    if len(index) and not (low <= int(index.min()) and int(index.max()) < stop):
        worst = int(index.min()) if int(index.min()) < low else int(index.max())
        raise FileError(f"{what} name {worst}, expected {low}..{stop - 1}: correct the plan")


def _mark(chosen: dict[str, Tensor], layer: UnitLayer, rows: Tensor) -> None:
    _check_range(f"rows of {layer.name!r}", rows, layer.n_units)
    mask = chosen.setdefault(layer.name, torch.zeros(layer.n_units, dtype=torch.bool))
    mask[rows] = True


def row_targets(
    tensors: Tensors, layer: UnitLayer, rows: Tensor
) -> Iterator[tuple[Region, Target]]:
    """Yield what to draw afresh, and where it stands: rows of the weight, elements of the bias.

    Raises:
        FileError: A tensor is missing or has another shape than the wiring says.
        InputError: A tensor is shared with another layer or not floating-point.
    """
    weight = tensors[layer.weight]
    _check_size(layer.weight, weight, layer.unit_dim, layer.n_units)
    index = (rows,) if layer.unit_dim == 0 else (slice(None), rows)
    yield Region(layer.weight, index), Target(layer.weight, weight, layer, rows=rows)
    if layer.bias is not None:
        bias = tensors[layer.bias]
        _check_shape(layer.bias, bias, (layer.n_units,))
        yield Region(layer.bias, (rows,)), Target(layer.bias, bias, layer, rows=rows)


def norm_writes(
    tensors: Tensors, layer: UnitLayer, norm: Norm, rows: Tensor
) -> Iterator[FillWrite]:
    """Yield what makes the norm's channels of these rows the identity."""
    channels = len(norm.unit_of_channel)
    hit = _columns(f"channels of {norm.name!r}", norm.unit_of_channel, layer, rows)
    names = [name for name in _NORM_VALUES if f"{norm.name}.{name}" in tensors]
    if not names:
        raise FileError(f"norm {norm.name!r} is not in the model: plan again with this model")
    for name in names:
        full = f"{norm.name}.{name}"
        _check_shape(full, tensors[full], (channels,))
        yield FillWrite(Region(full, (hit,)), _NORM_VALUES[name])


def column_region(tensors: Tensors, layer: UnitLayer, consumer: Consumer, rows: Tensor) -> Region:
    """Return the columns with which a consumer reads these rows."""
    weight = tensors[consumer.weight]
    columns = len(consumer.unit_of_column)
    if columns % consumer.groups or (consumer.groups > 1 and consumer.column_dim != 1):
        raise FileError(
            f"{columns} columns of {consumer.weight!r} do not form {consumer.groups} groups: "
            "plan again with this model"
        )
    per_group = columns // consumer.groups
    _check_size(consumer.weight, weight, consumer.column_dim, per_group)
    hit = _columns(f"columns of {consumer.weight!r}", consumer.unit_of_column, layer, rows)
    if consumer.groups == 1:
        index = (hit,) if consumer.column_dim == 0 else (slice(None), hit)
        return Region(consumer.weight, index)
    if weight.shape[0] % consumer.groups:
        raise FileError(
            f"{weight.shape[0]} rows of {consumer.weight!r} do not form {consumer.groups} groups: "
            "plan again with this model"
        )
    group, column = hit // per_group, hit % per_group
    return Region(consumer.weight, (group, slice(None), column), consumer.groups)


def _columns(what: str, unit_of_column: Tensor, layer: UnitLayer, rows: Tensor) -> Tensor:
    """Return the columns (or channels) that belong to these rows."""
    _check_range(what, unit_of_column, layer.n_units, low=-1)
    # One entry more, for -1.
    chosen = torch.zeros(layer.n_units + 1, dtype=torch.bool)
    chosen[rows] = True
    return chosen[unit_of_column].nonzero().flatten()


def _check_size(name: str, tensor: Tensor, dim: int, size: int) -> None:
    # Units and columns only ever run over the first two dimensions.
    if tensor.dim() < 2 or dim not in (0, 1) or tensor.shape[dim] != size:
        raise FileError(
            f"{name!r} has shape {tuple(tensor.shape)}, expected {size} in dimension {dim}: "
            "plan again with this model"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise FileError(
            f"{name!r} has shape {tuple(tensor.shape)}, expected {shape}: "
            "plan again with this model"
        )
