"""Take units or weights out of use for good: the control that shows what a smaller network does."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastplastic.initial import make_initializer
from fastplastic.planning import Plan
from fastplastic.reinit.changes import unit_change
from fastplastic.reinit.places import Where
from fastplastic.reinit.regions import Tensors, selected_elements
from fastplastic.reinit.transaction import place_of


def removal(model: nn.Module, plan: Plan) -> Callable[[], None]:
    """Return a function that sets what a plan names to zero, to be called after each update.

    Of units the outgoing columns are set to zero, so that they have no effect; with such columns no
    gradient reaches what makes them. Of single weights the weights themselves. The model is not
    written to before the function is called.

    Args:
        model: The model that the plan is for.
        plan: What `fastplastic.plan` chose.

    Raises:
        FileError: The plan does not fit the model.
    """
    tensors = Tensors(model)
    parts: Sequence[Where]
    if plan.granularity == "unit":
        initializer = make_initializer("default", model)
        parts = unit_change(model, plan, tensors, initializer, "zero").columns
    else:
        parts = selected_elements(tensors, plan)
    places = [place_of(tensors[part.name], part) for part in parts]

    def remove() -> None:
        with torch.no_grad():
            for place in places:
                place.fill(0.0)

    return remove
