"""What is asked of any live model: its batches, weights and head, and how it is left as found."""

from fastplastic.model.batch_groups import (
    BatchGroup,
    batch_group,
    cut_of,
    waited,
)
from fastplastic.model.batches import Batch, loss_of, outputs_of, read_batch, read_batches
from fastplastic.model.checks import (
    check_built,
    check_unwrapped,
    device_of,
    digest_of_copies,
    dtype_of,
    fingerprint,
    mode_of,
    nonfinite_tensors,
)
from fastplastic.model.left_as_found import attributes_kept, undisturbed
from fastplastic.model.lent_head import LentHead, give_head, loss_head, output_layers
from fastplastic.model.lines import Lines
from fastplastic.model.outlines import outline, stand_in
from fastplastic.model.spread import (
    Part,
    aligned,
    gathered_by_fsdp,
    is_spread,
    local_of,
    part_of,
    reshard,
)
from fastplastic.model.watchers import note_watcher
from fastplastic.model.weights import MeanGradient, Weights, weights_of

__all__ = [
    "Batch",
    "BatchGroup",
    "LentHead",
    "Lines",
    "MeanGradient",
    "Part",
    "Weights",
    "aligned",
    "attributes_kept",
    "batch_group",
    "check_built",
    "check_unwrapped",
    "cut_of",
    "device_of",
    "digest_of_copies",
    "dtype_of",
    "fingerprint",
    "gathered_by_fsdp",
    "give_head",
    "is_spread",
    "local_of",
    "loss_head",
    "loss_of",
    "mode_of",
    "nonfinite_tensors",
    "note_watcher",
    "outline",
    "output_layers",
    "outputs_of",
    "part_of",
    "read_batch",
    "read_batches",
    "reshard",
    "stand_in",
    "undisturbed",
    "waited",
    "weights_of",
]
