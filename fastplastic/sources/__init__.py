"""Where models and data come from: timm, the hub, checkpoint files, folders, the sample."""

from fastplastic.sources.data import DataSource, batches
from fastplastic.sources.loaders import Augmentation
from fastplastic.sources.models import LoadedModel, create_model, fresh_head
from fastplastic.sources.shape import InputShape
from fastplastic.sources.splits import Splits, WantedSplits, split_data

__all__ = [
    "Augmentation",
    "DataSource",
    "InputShape",
    "LoadedModel",
    "Splits",
    "WantedSplits",
    "batches",
    "create_model",
    "fresh_head",
    "split_data",
]
