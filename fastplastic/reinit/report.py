"""What `reinit_` says it has written."""

from dataclasses import asdict, dataclass
from typing import Any

from fastplastic.notebook import html_table


@dataclass(frozen=True)
class Written:
    """What was written to one tensor.

    Attributes:
        name: Name of the parameter or buffer; of optimizer state "PARAMETER: STATE".
        kind: "parameter", "buffer" or "optimizer state".
        elements: Number of elements written.
        total: Number of elements it has.
    """

    name: str
    kind: str
    elements: int
    total: int

    @property
    def share(self) -> float:
        """Share of the elements written, in [0, 1]."""
        return self.elements / self.total


@dataclass(frozen=True, repr=False)
class ReinitReport:
    """What `reinit_` wrote.

    Attributes:
        count: Number of units (or single weights) re-initialised.
        layers: Layer name -> number of its units selected in the plan; of single weights, by
            parameter name.
        shares: The same as shares of all units of the layer, or of all weights of the parameter.
        granularity: "unit" or "weight".
        init: Name of the initializer.
        outgoing: What was done to the outgoing columns; "keep" for single weights.
        seed: Seed of the fresh values.
        written: Every tensor that was written to, in the order of the first write.
        loss_before: Mean loss over the batches before anything was written; None without batches.
        loss_after: The same afterwards.
        notes: What a reader should know, one sentence each.
    """

    count: int
    layers: dict[str, int]
    shares: dict[str, float]
    granularity: str
    init: str
    outgoing: str
    seed: int
    written: tuple[Written, ...]
    loss_before: float | None = None
    loss_after: float | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        elements = sum(written.elements for written in self.written)
        units = self.granularity == "unit"
        where = ("layer" if units else "tensor") + "s" * (len(self.layers) != 1)
        outgoing = f", outgoing {self.outgoing}" if units else ""
        known = self.loss_before is not None
        loss = f"; loss {self.loss_before:.4g} to {self.loss_after:.4g}" if known else ""
        return (
            f"ReinitReport({self.count} {self.granularity}s in {len(self.layers)} {where}: "
            f"init {self.init}{outgoing}, {elements} elements of {len(self.written)} tensors{loss})"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks: what was written of which tensors."""
        titles = ("tensor", "kind", "written", "of", "share")
        rows = ((w.name, w.kind, w.elements, w.total, w.share) for w in self.written)
        return html_table(repr(self), titles, rows, self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that `json.dumps` takes, with the share of each tensor."""
        values = asdict(self)
        for entry, written in zip(values["written"], self.written, strict=True):
            entry["share"] = written.share
        return values
