"""What several processes that train one model must have in common."""

import torch

from fastplastic.criteria import CRITERIA
from fastplastic.errors import InputError
from fastplastic.training.methods import Method


def check_processes(method: Method) -> None:
    """Refuse what each process would choose by its own share of the data: InputError."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if distributed else 1
    if size == 1 or method.granularity == "weight":
        return
    local = CRITERIA[method.criterion].needs == "activations"
    if local or method.criterion == "activation_gradient" or method.compensate:
        raise InputError(
            f"{size} processes and criterion {method.criterion!r} of activations, which differ "
            "between them, so that each would re-initialise other units: expected one process, a "
            "criterion of the gradients that they share (method='grama' or 'swr'), or batches= "
            "that are the same in all"
        )
