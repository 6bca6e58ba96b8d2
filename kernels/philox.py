"""Random words that depend on a seed, a name and an element alone: Philox4x32-10.

Word 0 of the block with counter (element low, element high, 0, 0) and a 64-bit key belongs to one
element of one parameter; what else is drawn, in which order and on which device, does not matter.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from hashlib import blake2b

ROUNDS = 10
# Multipliers of counter words 0 and 2, and what is added to the two halves of the key per round.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

TIES = "ties"
INITIAL_VALUES = "initial values"


def philox_key(seed: int, purpose: str, name: str) -> int:
    """Return the 64-bit key of the words of one parameter; its low 32 bits are key word 0.

    Args:
        seed: Any integer.
        purpose: What the words are for, so that two uses of one name differ: `TIES` for the order
            of equal scores in `select`, `INITIAL_VALUES` for `resample_`.
        name: Dotted name of the parameter.
    """
    text = f"{seed}\0{purpose}\0{name}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
