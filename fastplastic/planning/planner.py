"""What to re-initialise: a pure function from a profile to a plan. No model is seen here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastplastic.criteria import CRITERIA
from fastplastic.errors import FileError, InputError
from fastplastic.files import StoredPlan, read_plan, write_plan
from fastplastic.model import Part
from fastplastic.notebook import html_table
from fastplastic.planning.holders import Holders
from fastplastic.planning.request import (
    DEFAULT_CRITERIA,
    Choice,
    Request,
    patterns,
    stored_checks,
)
from fastplastic.planning.units import choose_units, choose_units_like, wiring_of
from fastplastic.planning.weights import choose_weights, choose_weights_like
from fastplastic.wiring import UnitLayer

if TYPE_CHECKING:
    from fastplastic.measure import Profile


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which units or single weights to re-initialise, and why.

    Made by `plan`, applied by `reinit_`.

    Attributes:
        request: What was asked for. Its fields are attributes of the plan, too: criterion, ratio,
            threshold, scope, granularity, max_layer_fraction, seed.
        units: Layer name -> the selected units, int64, ascending; no layer is empty.
        scores: Layer name -> the score of each selected unit, float64.
        wiring: Layer name -> how its units are wired, of every layer in `units` and of those whose
            rows are coupled to them; of masks, the layers that own the weights, without consumers.
        eligible: Number of units (or weights) there were to choose from.
        fingerprint: Fingerprint of the model that was profiled.
        masks: Parameter name -> bool mask of the selected weights, on the CPU; no mask is empty.
            There are none for granularity "unit". Of a parameter that is cut over processes, the
            part of this process, which may be all False.
        parts: Parameter name -> which part of it its mask is of, of those that are cut over
            processes; the same names in each.
        part_counts: Parameter name -> how many weights are selected in all of it, of the same.
        notes: What a reader should know, one sentence each.
    """

    request: Request
    units: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    wiring: Mapping[str, UnitLayer]
    eligible: int
    fingerprint: str
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: Mapping[str, Part] = field(default_factory=dict)
    part_counts: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        amount = f"ratio {self.ratio:g}" if self.ratio is not None else f"up to {self.threshold:g}"
        where = f"{len(self.units)} layers" if self.units else f"{len(self.masks)} tensors"
        return (
            f"Plan({self.criterion}, {amount}: {self.count} of {self.eligible} "
            f"{self.granularity}s in {where})"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks: how much of which layers, or of which parameters."""
        units = [
            (name, self.wiring[name].n_units, len(chosen), *_lowest_and_highest(self.scores[name]))
            for name, chosen in self.units.items()
        ]
        sizes, counts = self.sizes, self.counts
        masks = [(name, sizes[name], counts[name]) for name in self.masks]
        if masks:
            return html_table(repr(self), ("parameter", "weights", "chosen"), masks, self.notes)
        titles = ("layer", "units", "chosen", "lowest score", "highest score")
        return html_table(repr(self), titles, units, self.notes)

    @property
    def criterion(self) -> str:
        """Name in `criteria.CRITERIA`, or of weights, in `criteria.WEIGHT_CRITERIA`."""
        return self.request.criterion

    @property
    def ratio(self) -> float | None:
        """Share of the eligible units that was asked for, or None."""
        return self.request.ratio

    @property
    def threshold(self) -> float | None:
        """Score that was asked for, or None; one of ratio and threshold is given."""
        return self.request.threshold

    @property
    def scope(self) -> str:
        """Whether the ratio holds for each layer or for all together."""
        return self.request.scope

    @property
    def granularity(self) -> str:
        """Whether whole units or single weights are selected: "unit" or "weight"."""
        return self.request.granularity

    @property
    def max_layer_fraction(self) -> float:
        """Largest share of the eligible units of any layer."""
        return self.request.max_layer_fraction

    @property
    def seed(self) -> int:
        """Seed of the ties and of the criterion `random`."""
        return self.request.seed

    @property
    def count(self) -> int:
        """Number of units (or weights) selected."""
        return sum(self.counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Number of units selected in each layer, or of weights in each (whole) parameter."""
        chosen = {name: len(units) for name, units in self.units.items()}
        for name, mask in self.masks.items():
            cut = name in self.parts
            chosen[name] = self.part_counts[name] if cut else int(mask.count_nonzero())
        return chosen

    @property
    def sizes(self) -> dict[str, int]:
        """Number of all units of each layer in the plan, or of all weights of each parameter."""
        found = {name: self.wiring[name].n_units for name in self.units}
        for name, mask in self.masks.items():
            cut = name in self.parts
            found[name] = math.prod(self.parts[name].shape) if cut else mask.numel()
        return found

    @property
    def beyond(self) -> int | None:
        """Number of selected units beyond the threshold of the criterion's source.

        The others are healthy by that criterion. None where it has no threshold, and for weights.
        """
        rule = CRITERIA.get(self.criterion)
        if self.granularity == "weight" or rule is None or rule.threshold is None:
            return None
        found = (rule.beyond(scores) for scores in self.scores.values())
        return sum(int(part.sum()) for part in found if part is not None)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the plan; an unfinished file never shows.

        Units are written as JSON that a person can read, masks as safetensors, one bit for each
        weight.

        Raises:
            FileError: The path cannot be written, or exists and `force` is false.
            InputError: Masks are to be written to a file whose name does not end in .safetensors,
                or units to one whose name does. Masks are parts.
        """
        if self.parts:
            raise InputError(
                f"{path}: {len(self.parts)} of the {len(self.masks)} masks are parts, those of "
                "this process, expected whole ones: apply the plan in the same run (reinit_), or "
                "make it in one process, before the model is spread"
            )
        stored = StoredPlan(
            request=self.request.stored(), fingerprint=self.fingerprint, eligible=self.eligible,
            wiring=self.wiring, units=self.units, scores=self.scores, masks=self.masks,
            notes=self.notes, beyond=self.beyond,
        )  # fmt: skip
        write_plan(stored, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan that `save` wrote, perhaps edited by hand since.

        Raises:
            FileError: The file is missing, not a plan, of another version, or inconsistent.
        """
        stored = read_plan(path, stored_checks)
        request = Request(**stored.request)
        try:
            request.check()
        except InputError as error:
            raise FileError(f"{path}: {error}") from None
        return cls(
            request.plain(), stored.units, stored.scores, stored.wiring, stored.eligible,
            stored.fingerprint, stored.masks, tuple(stored.notes),
        )  # fmt: skip


def _lowest_and_highest(scores: Tensor) -> tuple[float, float]:
    return float(scores.min()), float(scores.max())


def plan(
    profile: "Profile",
    *,
    criterion: str | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    granularity: str = "unit",
    scope: str = "global",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_layer_fraction: float = 0.5,
    seed: int = 0,
) -> Plan:
    """Choose the units, or the single weights, to re-initialise.

    Units: eligible are the hidden units of the chosen layers with a known score, but for those that
    weights make or read which do not learn (`requires_grad` is false). A unit made by several rows
    is as healthy as its weakest row. Weights: eligible are the elements of the weights of the
    chosen layers, but for NaN scores; a layer that no gradient reaches is left out, and so is a
    weight that does not learn and what makes the output. Biases, norms, embeddings, class tokens
    and the head are chosen only if `include` has their full name. After Hernandez-Garcia et al.
    (SWR), arXiv 2508.00212.

    Equal scores are ordered by a hash of (seed, name, unit or element), so the choice depends
    neither on the order of layers nor on which others are looked at.

    Where processes hold parts of the weights (FSDP2), all of them call it and choose what one would
    of the whole weights. Units are chosen without a word to each other.

    Args:
        profile: What `fastplastic.profile` or a `Monitor` measured; for weights, what `profile`
            measured with gradients=True, of a model whose weights are still the same.
        criterion: Name in `criteria.CRITERIA`, or `criteria.WEIGHT_CRITERIA` for weights; formulas
            and sources stand there. By default "dormant" for units, which needs no gradients (see
            benchmarks/transfer/README.md for how each did), and "swr" for weights.
        ratio: Select exactly floor(ratio * eligible units), in (0, 1].
        threshold: Select the units whose score is at most (for `frozen` and `saturated`: at least)
            this, or the weights whose score is at most this times the mean score of their tensor.
            Give either this or `ratio`.
        granularity: "unit" or "weight".
        scope: "global" compares the scores of all layers, "layer" takes the ratio of each layer
            (largest remainders get the units left over, so that the total is exact).
        include: Patterns (fnmatch) of layer names to choose from; empty for all. A full name also
            takes what does not learn.
        exclude: Patterns of layer names whose rows stay as they are.
        max_layer_fraction: Never more than floor(this * eligible units) of a layer, in (0, 1].
        seed: Any integer.

    Raises:
        InputError: An argument is unusable, nothing is eligible, or `max_layer_fraction` leaves
            too few units for `ratio`. The profile holds no gradients, or the weights have changed.
        ProcessError: Another process that holds parts of the weights is gone, failed, or is asked
            for something else.
    """
    request = Request(
        criterion=criterion or DEFAULT_CRITERIA.get(granularity, ""),
        ratio=ratio,
        threshold=threshold,
        granularity=granularity,
        scope=scope,
        include=patterns(include),
        exclude=patterns(exclude),
        max_layer_fraction=max_layer_fraction,
        seed=seed,
    )
    holders = Holders.of(profile, granularity)
    with holders.meeting("plan", profile, request):
        chosen = _chosen(profile, request, holders)
    nothing = () if chosen.units or chosen.masks else (f"no {granularity} is selected",)
    made = Plan(
        request.plain(), chosen.units, chosen.scores, chosen.wiring, chosen.eligible,
        profile.fingerprint, chosen.masks, (*chosen.notes, *nothing), chosen.parts,
        chosen.part_counts,
    )  # fmt: skip
    return replace(made, notes=(*made.notes, *_health(made)))


def _chosen(profile: "Profile", request: Request, holders: Holders) -> Choice:
    request.check()
    if not profile.layers:
        raise InputError(
            "the profile has no layers, expected at least one: profile the model again"
        )
    if request.granularity == "unit":
        return choose_units(profile, request)
    return choose_weights(profile, request, holders)


def plan_of_units(
    profile: "Profile",
    request: Request,
    units: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
) -> Plan:
    """Return the plan of units that were chosen elsewhere.

    Args:
        profile: Of the model that they are of.
        request: What they were chosen by.
        units: Layer name -> int64, ascending.
        scores: Layer name -> float64, the score of each.
    """
    eligible = sum(int(layer.wiring.hidden.sum()) for layer in profile.layers)
    return Plan(request, units, scores, wiring_of(profile, units), eligible, profile.fingerprint)


def control(plan: Plan, profile: "Profile", *, seed: int) -> Plan:
    """Return the control of a plan: as many units (or weights) of each layer, chosen at random.

    What such a plan does to a network, the dose alone does; only what the first plan does better is
    the work of its criterion.

    Args:
        plan: Made from the profile.
        profile: What the plan was made from.
        seed: Of the choice, any integer.

    Raises:
        InputError: The profile holds no gradients or the weights have changed, for weights.
    """
    request = replace(plan.request, criterion="random", seed=int(seed))
    if request.threshold is not None:
        share = plan.count / max(plan.eligible, 1)
        request = replace(request, threshold=None, ratio=share)
    if plan.granularity == "unit":
        chosen = choose_units_like(profile, request, plan.counts)
    else:
        holders = Holders.of(profile, plan.granularity)
        with holders.meeting("control", profile, request):
            chosen = choose_weights_like(profile, request, plan.counts, holders)
    return Plan(
        request, chosen.units, chosen.scores, chosen.wiring, plan.eligible, plan.fingerprint,
        chosen.masks, parts=chosen.parts, part_counts=chosen.part_counts,
    )  # fmt: skip


def _health(plan: Plan) -> tuple[str, ...]:
    """Return a note where units are taken that are healthy by the criterion."""
    if plan.beyond is None or plan.beyond == plan.count:
        return ()
    healthy = plan.count - plan.beyond
    rule = CRITERIA[plan.criterion]
    return (
        f"{healthy} of the {plan.count} chosen units are healthy by {rule.name}, whose threshold "
        f"is {rule.threshold:g}: threshold {rule.threshold:g} instead of a ratio takes the weak "
        "ones alone",
    )
