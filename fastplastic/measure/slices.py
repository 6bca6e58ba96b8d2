"""Which channels of a tensor this process has, where a batch group shares the layers of a model.

A layer whose weight is cut along its units gives a slice of its channels, one that is cut along its
columns is given a slice. What stands between them goes by the layer that made it.
"""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor, nn

from fastplastic.errors import InputError
from fastplastic.measure.slots import TensorRead
from fastplastic.model import BatchGroup, cut_of, gathered_by_fsdp, is_spread, local_of, waited
from fastplastic.wiring import Site, UnitGraph, UnitLayer


class Slices:
    """The slices of this process.

    Args:
        model: The model.
        graph: Its wiring.
        group: The processes that share its layers.

    Raises:
        InputError: Slices of a layer are not of the same kind, and are computed alike.
    """

    def __init__(self, model: nn.Module, graph: UnitGraph, group: BatchGroup) -> None:
        self._cuts: dict[str, tuple[int, range]] = {}
        sharded = gathered_by_fsdp(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            fsdp = id(parameter) in sharded
            cut = cut_of(parameter, group, fsdp=fsdp) if is_spread(parameter) else None
            if cut is not None:
                self._cuts[name] = cut
        for layer in graph.layers:
            if self._of_units(layer) is not None:
                _check_kinds(layer, len(group.ranks))

    def of(self, layer: UnitLayer, site: Site) -> range | None:
        """Return the channels that this process may have of a tensor; None for all or unknown."""
        channels = site.unit_of_channel.numel()
        weight = f"{site.module}.weight" if site.module else "weight"
        if weight in self._cuts:
            dim, own = self._cuts[weight]
            return own if (dim, site.where) in ((0, "output"), (1, "input")) else None
        units = self._of_units(layer)
        if units is None:
            return None
        there = (site.unit_of_channel >= units.start) & (site.unit_of_channel < units.stop)
        at = there.nonzero().flatten().tolist()
        if not at:
            return range(0) if len(units) == 0 else None
        own = range(at[0], at[-1] + 1)
        return own if len(own) == len(at) <= channels else None

    def _of_units(self, layer: UnitLayer) -> range | None:
        dim, own = self._cuts.get(layer.weight, (None, range(0)))
        return own if dim == layer.unit_dim else None


def _check_kinds(layer: UnitLayer, parts: int) -> None:
    """Refuse a layer of whose units each process has others, and computes with them alike."""
    names = ["unknown"] * layer.n_units
    for first, stop, name in layer.activations:
        names[first:stop] = [name] * (stop - first)
    hidden = zip(names, layer.hidden.tolist(), strict=True)
    names = [name if own else f"{name}, not hidden" for name, own in hidden]
    step = -(-layer.n_units // parts)
    kinds = [names[begin : begin + step] for begin in range(0, layer.n_units, step)]
    if any(kind != kinds[0][: len(kind)] for kind in kinds):
        found = "; ".join(name for name, _ in groupby(names))
        raise InputError(
            f"the units of {layer.name!r} are of several kinds ({found}), and {parts} processes "
            "have a slice each, which they treat alike: that is not what the whole model computes, "
            "expected a layer of its own for each kind, or one that is not cut"
        )


def seen_here(read: TensorRead, tensor: Tensor | None) -> tuple[TensorRead, Tensor] | str:
    """Return what to read of a tensor that a hook was given.

    Args:
        read: Of the whole tensor.
        tensor: What this process has of it; None for no tensor.

    Returns:
        What to read, of which values; or why that is not known.
    """
    if tensor is None:
        return read.misfit(tensor)
    fitting: Sequence[TensorRead | None] = (read.cut, read)
    if is_spread(tensor):
        placements = getattr(tensor, "placements", ())
        cut = [p for p in placements if not p.is_replicate()]
        along = [getattr(p, "dim", None) for p in cut]
        axis = read.axis % tensor.ndim if tensor.ndim else read.axis
        if len(placements) > 1 or along not in ([], [axis]):
            return (
                f"its tensor is placed as {tuple(map(str, placements))}, expected all of it or "
                "a slice of its channels in each process"
            )
        fitting = (read.cut,) if cut else (read,)
        tensor = local_of(tensor)
    tensor = waited(tensor)
    for one in fitting:
        if one is not None and one.fits(tensor):
            return one, tensor
    return read.misfit(tensor)


def gradient_here(read: TensorRead, gradient: Tensor) -> Tensor | None:
    """Return the values of a gradient of what was read; None where each process has a summand."""
    placements = getattr(gradient, "placements", ()) if is_spread(gradient) else ()
    if any(placement.is_partial() for placement in placements):
        return None
    own = waited(local_of(gradient))
    return own if read.fits(own) else None
