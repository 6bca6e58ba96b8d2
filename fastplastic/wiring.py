"""How the units of a model are wired: plain values, made by `graph`, read by all the rest.

Nothing here holds a model. Index maps are int64 tensors on the CPU with -1 for "none".
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

Argument = Literal["query", "key", "value"]
ARGUMENTS: tuple[Argument, ...] = get_args(Argument)
Where = Literal["input", "output", Argument]


@dataclass(frozen=True, eq=False)
class Site:
    """Where a hook sees the units of a layer in the running model.

    Attributes:
        module: Dotted name of the module to hook.
        where: Whether its first input or its output is the tensor. "query", "key" and "value" are
            what `nn.MultiheadAttention` multiplies with this argument, and no hook sees.
        unit_axis: Dimension of that tensor which runs over channels.
        unit_of_channel: int64 [size of that dimension], the layer's unit in each channel, or -1.
    """

    module: str
    where: Where
    unit_axis: int
    unit_of_channel: Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm with channels that belong to units of the layer.

    Attributes:
        name: Dotted module name; it owns weight, bias, running_mean and running_var where present.
        unit_of_channel: int64 [channels], the layer's unit in each channel, or -1.
    """

    name: str
    unit_of_channel: Tensor


@dataclass(frozen=True, eq=False)
class Consumer:
    """A weight layer that reads units of the layer through its columns.

    Attributes:
        name: Dotted module name of the reading layer.
        weight: Name of its weight parameter.
        column_dim: Dimension of the weight that runs over columns
            (1 for Linear and convolution, 0 for Hugging Face Conv1D and transposed convolution).
        groups: Convolution groups. With more than one, column c stands at index
            c % (columns / groups) of `column_dim`, in the rows of group c // (columns / groups).
        unit_of_column: int64 [columns], the layer's unit that each column reads, or -1.
    """

    name: str
    weight: str
    column_dim: int
    groups: int
    unit_of_column: Tensor


@dataclass(frozen=True, eq=False)
class Coupling:
    """Rows of a (possibly the same) layer that make one unit with the rows of the lead layer.

    Attributes:
        name: Name of the member layer.
        row_of_unit: int64 [units of the lead layer], the member's row for each unit, or -1.
    """

    name: str
    row_of_unit: Tensor


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """One weight layer: what makes its units and what reads them.

    Attributes:
        name: Dotted module name of the producer.
        kind: "linear", "conv", "depthwise conv", "conv transpose" or "conv1d" (Hugging Face).
        weight: Name of the weight parameter.
        bias: Name of the bias parameter, or None.
        unit_dim: Dimension of the weight that runs over units.
        n_units: Number of units.
        norm: Name of the BatchNorm between the layer and its activation function, or None.
        activations: Runs (start, stop, name) of units with one activation function each. Of
            "unknown" ones nothing is measured but their weights.
        unknown: Why the activation function of units is unknown, each with its number of units.
        hidden: bool [n_units], units that can be re-initialised under this layer's name.
        reasons: Why the other units cannot, each with its number of units.
        norms: Every BatchNorm that holds channels of these units (the one in `norm` too).
        coupled: Rows that are re-initialised together with these units.
        consumers: What reads these units directly.
        z_sites: Where the pre-activations are seen. A unit stands at several sites where
            consumers read it behind norms of their own: its h is all that they get.
        g_sites: Where the gradients to the activations are seen.
        transformed: The weight is changed before use (weight standardisation, weight_norm).
        head: It makes the output: no weight layer reads anything that depends on it. Of a model
            that could not be traced, the last layer.
        tied: Names of other modules that hold the same weight.
        without_grad: Names of weights that do not learn (`requires_grad` is false): of the layer
            itself and of its consumers. Known of a profile only, not of a graph.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    unit_dim: int
    n_units: int
    norm: str | None
    activations: tuple[tuple[int, int, str], ...]
    hidden: Tensor
    reasons: dict[str, int] = field(default_factory=dict)
    norms: tuple[Norm, ...] = ()
    coupled: tuple[Coupling, ...] = ()
    consumers: tuple[Consumer, ...] = ()
    z_sites: tuple[Site, ...] = ()
    g_sites: tuple[Site, ...] = ()
    transformed: bool = False
    head: bool = False
    unknown: dict[str, int] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    without_grad: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Its name and those of the other modules that hold the same weight."""
        return frozenset((self.name, *self.tied))

    @property
    def activation(self) -> str:
        """The activation function; several are joined with "/" in the order of the units."""
        return "/".join(dict.fromkeys(name for _, _, name in self.activations))

    @property
    def row_site(self) -> Site | None:
        """The first site that shows all units which are seen at any: whole rows of activations."""
        shown = [set(site.unit_of_channel.tolist()) - {-1} for site in self.z_sites]
        seen = set().union(*shown)
        return next(
            (s for s, units in zip(self.z_sites, shown, strict=True) if units == seen), None
        )


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """Every weight layer of a model in execution order, and those left out with the reason.

    Attributes:
        layers: The unit layers.
        skipped: (layer name, reason) of weight layers that are not in `layers`.
        note: Why the wiring is unknown, when the model could not be traced; else None.
    """

    layers: tuple[UnitLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    note: str | None = None

    def __getitem__(self, name: str) -> UnitLayer:
        """Return the layer with this name; KeyError when there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


def is_conv1d(module: object) -> bool:
    """Tell whether a module is Hugging Face's Conv1D: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"
