"""Where models and data come from: timm, the hub, checkpoint files, folders, the sample."""

from fastplastic.sources.data import DataSource, batches
from fastplastic.sources.models import LoadedModel, create_model

__all__ = ["DataSource", "LoadedModel", "batches", "create_model"]
