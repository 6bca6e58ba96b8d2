"""Rebuild fastplastic/sources/sample.npz, byte for byte, from the originals of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python benchmarks/make_sample.py -o sample.npz

The images are of the TRAINING set: a re-initialisation that they choose can be measured on the test
set. Of each class 32 are drawn without replacement (seed 0); every ten images in a row hold each
class once, in the order of the labels.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from fastplastic.files.checkpoint import atomic_write

ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
PER_CLASS, CLASSES, SIDE, SEED = 32, 10, 28, 0


def read(path: Path, header: int) -> np.ndarray:
    """Return the bytes of a gzipped IDX file after its header, uint8."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def choose(labels: np.ndarray) -> np.ndarray:
    """Return the indices of the chosen images: 32 of each class, interleaved."""
    generator = np.random.default_rng(SEED)
    chosen = [
        generator.choice(np.flatnonzero(labels == label), PER_CLASS, replace=False)
        for label in range(CLASSES)
    ]
    return np.stack(chosen, axis=1).reshape(-1)


def main() -> None:
    """Read the originals and write the sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("fastplastic/sources/sample.npz"))
    parser.add_argument(
        "--originals", type=Path, default=ORIGINALS, help="folder with the IDX files"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    options = parser.parse_args()
    images = read(options.originals / "train-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
    labels = read(options.originals / "train-labels-idx1-ubyte.gz", 8)
    chosen = choose(labels)
    with atomic_write(options.output, options.force) as temporary, temporary.open("wb") as file:
        # Not compressed: what deflate makes of the same bytes depends on the version of zlib.
        np.savez(file, images=images[chosen], labels=labels[chosen])


if __name__ == "__main__":
    main()
