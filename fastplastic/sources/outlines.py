"""Models for their structure alone."""

from typing import Any

import torch

from fastplastic.sources.loaded import LoadedModel
from fastplastic.sources.models import create_model


def create_outline(name: str, **arguments: Any) -> LoadedModel:
    """Make a model without memory for its weights, where its code allows that.

    Args:
        name: As for `create_model`.
        arguments: As for `create_model`, but for where weights come from.

    Returns:
        The model on the meta device; with random weights where it cannot be made there.

    Raises:
        InputError: As `create_model`.
        FileError: As `create_model`.
    """
    try:
        with torch.device("meta"):
            return create_model(name, pretrained=False, **arguments)
    except Exception:  # the code of a model may raise anything there; if it is wrong, it does again
        return create_model(name, pretrained=False, **arguments)
