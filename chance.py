"""Chance is a function of the step: the one place where random numbers come from.

Every draw in this project (gates, widths, data order, augmentation, splits) is made by a generator
that is built on the spot from what the draw is for: ``generator("gates", seed, step)``. Nothing has
to be saved, restored or synchronised: a resumed run and every rank of a distributed one make the
same draws because they ask the same question.
"""

import hashlib

from torch import Generator


def key_to_seed(*key: int | str) -> int:
    """Hashes a key to 64 bits. Equal keys give equal seeds in any process on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(*key: int | str) -> Generator:
    """Returns a fresh CPU generator for `key`, for example ``("gates", seed, step)``.

    The first part names the purpose, so that two purposes never share a stream.
    """
    return Generator().manual_seed(key_to_seed(*key))
