"""What has to be the same in all processes that torchrun started, before anything is measured."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fastplastic.cli.options import DataOptions

if TYPE_CHECKING:
    from torch import nn

    from fastplastic.sources import DataSource, LoadedModel

# Paths, which may be others on another machine, and what concerns one process alone.
_OWN = {"model", "checkpoint", "data", "plan", "device", "workers", "force"}
_OUTPUTS = {"json", "csv", "html", "plot", "output"}


def agree(options: DataOptions, loaded: "LoadedModel", source: "DataSource | None") -> None:
    """Wait for all processes, and name one that has other options, another model or other data.

    Raises:
        ProcessError: One has, or is gone.
    """
    from fastplastic.processes import all_processes

    others = all_processes()
    if others is None:
        return
    from fastplastic.model import fingerprint
    from fastplastic.trials import digest_of

    # First the options, which all else depends on.
    others.meet("start", {f"--{name.replace('_', '-')}": x for name, x in _said(options).items()})
    # Weights that one could not get would be random there.
    facts = {
        "the model": fingerprint(loaded.model)[:12],
        "the weights": digest_of(loaded.model)[:12],
    }
    if source is not None:
        facts["the data"] = (
            f"{source.samples} samples of {source.num_classes} classes in batches of "
            f"{source.batch_size}"
        )
    others.meet("start", facts)


def _said(options: Any) -> dict[str, str]:
    """Return the options that change what is measured or written, in words."""
    values = {item.name: getattr(options, item.name) for item in fields(options)}
    named = {name: str(value is not None) for name, value in values.items() if name in _OUTPUTS}
    others = {name: str(value) for name, value in values.items() if name not in _OWN | _OUTPUTS}
    return named | others


def average_norms(model: "nn.Module") -> None:
    """Average the running statistics of BatchNorm that each process measured over its batches.

    Each is a mean over so many batches, and becomes that over the batches of all processes.
    """
    from fastplastic.processes import all_processes

    others = all_processes()
    if others is None:
        return
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    for norm in model.modules():
        count = getattr(norm, "num_batches_tracked", None)
        if not isinstance(norm, _BatchNorm) or count is None:
            continue
        kinds = ("running_mean", "running_var")
        sums = torch.stack([getattr(norm, kind).double() * count for kind in kinds])
        table = torch.cat([count.double().view(1), sums.flatten()]).cpu()
        others.add_(table)
        count.fill_(int(table[0]))
        for kind, total in zip(kinds, table[1:].view(2, -1), strict=True):
            setattr(norm, kind, (total / table[0]).to(getattr(norm, kind)))
