"""A random order that is computed, not stored: the sample at a position is a pure function.

A Feistel network over the fewest bits that hold n, walked along its cycle until the result is
below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), is a
permutation of range(n). So a loader's whole state is one integer, and resuming costs nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 6
_WORD = 1 << 64


def mix(*values: int) -> int:
    """One 63-bit integer that depends on every bit of `values`: a seed out of several."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) % _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB % _WORD
        state ^= state >> 31
    return state >> 1


def shuffled(positions: ArrayLike, n: int, seed: int) -> NDArray[np.int64]:
    """The sample, in range(n), at each of `positions`; every n positions are an epoch, reordered.

    >>> sorted(shuffled(range(5), 5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    position = np.asarray(positions, np.uint64)
    epoch, index = np.divmod(position, np.uint64(n))
    key = _scramble(epoch + np.uint64(mix(seed)))
    index = _feistel(index, key, n)
    while (outside := index >= n).any():
        index[outside] = _feistel(index[outside], key[outside], n)
    return index.astype(np.int64)


def _feistel(index: NDArray[np.uint64], key: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << b) - 1) for b in (bits // 2, bits - bits // 2))
    low, high = index & low_mask, index >> low_bits
    for turn in range(0, _ROUNDS, 2):
        low = low ^ (_scramble(high + key + np.uint64(turn << 48)) & low_mask)
        high = high ^ (_scramble(low + key + np.uint64(turn + 1 << 48)) & high_mask)
    return (high << low_bits) | low


def _scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
