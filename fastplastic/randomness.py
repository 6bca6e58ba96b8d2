"""Random numbers keyed by names, so that they depend on no order and on no other choice.

One Philox stream belongs to each (seed, purpose, name); Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011. The global random state is neither read nor written.
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def unit_noise(seed: int, purpose: str, name: str, n_units: int) -> Tensor:
    """Return one uniform number in [0, 1) per unit, float64 [n_units]; unit u keeps its number.

    Args:
        seed: Any integer.
        purpose: What the numbers are for, so that two uses of one name differ.
        name: Dotted name of a layer.
        n_units: How many numbers to return.
    """
    return torch.from_numpy(stream(seed, purpose, name).random(n_units))


def stream(seed: int, purpose: str, name: str) -> np.random.Generator:
    """Return the generator that belongs to a seed, a purpose and a name, at its beginning."""
    text = f"{seed}\0{purpose}\0{name}".encode()
    key = int.from_bytes(blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
