"""Moving averages of a model (EMA), which are not to be re-initialised unnoticed."""

import re
from collections.abc import Iterable

from torch import nn

from fastplastic.errors import InputError
from fastplastic.reinit.report import Written

# torch.optim.swa_utils and timm.utils.
_CLASSES = ("AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3")
_NAMED_SO = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)", re.IGNORECASE)


def refuse_average(model: nn.Module) -> None:
    """Refuse a model that is the moving average of another: InputError."""
    name = type(model).__name__
    if name in _CLASSES:
        raise InputError(
            f"the model is a {name}, a moving average, expected the model that is trained: "
            "re-initialise that one, and begin the average anew from it"
        )


def notes_of_averages(written: Iterable[Written]) -> tuple[str, ...]:
    """Return a note where something was written whose name says that it is an average."""
    names = [entry.name for entry in written if _NAMED_SO.search(entry.name)]
    if not names:
        return ()
    return (
        f"{len(names)} tensors are named as a moving average and were written too ({names[0]}, "
        "...): exclude their layers from the plan if the average is to stay",
    )
