"""Make generators that depend on a key alone, so that a resumed run draws the same numbers without saved state."""

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """Make a CPU generator seeded from `key`, such as ("epoch", seed, epoch).

    Equal keys draw equal numbers, on any device. The key is hashed because the generator uses only 32 bits of its seed,
    and neighbouring seeds start out alike.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
