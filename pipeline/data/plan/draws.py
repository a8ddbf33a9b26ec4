"""Random numbers that belong to what they decide, and to no process; free of torch."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


def draw(*key: int | str) -> int:
    """64 random bits that belong to `key`."""
    return _hash(8, *key)


def permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """The permutation of `length` that belongs to `key`."""
    # Raw words, because numpy may change what a Generator makes of them (NEP 19).
    words = np.random.Philox(key=_hash(16, *key)).random_raw(length)
    return np.argsort(words, kind="stable")


def generator(seed: int) -> np.random.Generator:
    """The generator that belongs to a slot's seed."""
    return np.random.Generator(np.random.Philox(key=seed))


def _hash(size: int, *key: int | str) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=size).digest(), "little")
