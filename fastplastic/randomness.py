"""Random numbers keyed by names, so that they depend on no order and on no other choice.

One Philox stream belongs to each (seed, name, row); Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011. The global random state is neither read nor written.
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def keyed_generator(seed: int, purpose: str, name: str, row: int = 0) -> np.random.Generator:
    """Return the generator of one (seed, purpose, name, row).

    Args:
        seed: Any integer.
        purpose: What the numbers are for, so that two uses of one name differ.
        name: Dotted name of a layer or parameter.
        row: Unit within it, 0 or more.
    """
    text = f"{seed}\0{purpose}\0{name}".encode()
    # The row takes the upper half of the counter: streams are 2**128 blocks apart.
    bits = np.random.Philox(key=_key(text), counter=row << 128)
    return np.random.Generator(bits)


def unit_noise(seed: int, purpose: str, name: str, n_units: int) -> Tensor:
    """Return one uniform number in [0, 1) per unit, float64 [n_units]; unit u keeps its number."""
    return torch.from_numpy(keyed_generator(seed, purpose, name).random(n_units))


def _key(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=16).digest(), "little")
