"""Where models and data come from: timm, the hub, checkpoint files, folders, the sample."""

from fastplastic.sources.data import DataSource, batches
from fastplastic.sources.folders import takes_texts
from fastplastic.sources.loaded import LoadedModel, fresh_head
from fastplastic.sources.loaders import Augmentation
from fastplastic.sources.models import create_model
from fastplastic.sources.outlines import create_outline
from fastplastic.sources.saving import save_model
from fastplastic.sources.shape import InputShape
from fastplastic.sources.share import Share
from fastplastic.sources.splits import Splits, WantedSplits, split_data
from fastplastic.sources.tell import put_head
from fastplastic.sources.text_task import text_batches
from fastplastic.sources.torchvision_models import torchvision_names, torchvision_tags

__all__ = [
    "Augmentation",
    "DataSource",
    "InputShape",
    "LoadedModel",
    "Share",
    "Splits",
    "WantedSplits",
    "batches",
    "create_model",
    "create_outline",
    "fresh_head",
    "put_head",
    "save_model",
    "split_data",
    "takes_texts",
    "text_batches",
    "torchvision_names",
    "torchvision_tags",
]
