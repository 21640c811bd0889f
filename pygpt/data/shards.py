"""Token shards: a 64-byte header, then ids as little-endian uint16 or uint32, memory-mapped.

Header: magic (8 bytes), bytes per id (uint32), vocabulary size (uint32), count (uint64), sha256 of
these fields and of the ids (32 bytes), zeros. `open_shard` notices a change of any byte.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pygpt.errors import DataError

MAGIC = b"PYGPTIDS"
HEADER = 64
_CHUNK = 1 << 22


def write_shard(path: Path, pieces: Iterable[NDArray[Any]], vocab_size: int) -> int:
    """Write the ids of `pieces` one after the other; returns their count."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    count = 0
    with open(path, "wb") as file:
        file.write(bytes(HEADER))
        for piece in pieces:
            if piece.size and int(piece.max()) >= vocab_size:
                raise ValueError(f"id {piece.max()} is not below the vocabulary size {vocab_size}")
            file.write(np.ascontiguousarray(piece, dtype).data)
            count += piece.size
    fields = MAGIC + struct.pack("<IIQ", dtype.itemsize, vocab_size, count)
    digest = _digest(fields, np.memmap(path, dtype, "r", HEADER, count) if count else _empty(dtype))
    with open(path, "r+b") as file:
        file.write(fields + digest)
        file.flush()
        os.fsync(file.fileno())
    return count


def open_shard(path: Path) -> NDArray[Any]:
    """The ids of a shard, memory-mapped, once all of it is verified; DataError otherwise."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER or not header.startswith(MAGIC):
        raise DataError(f"{path} is not a token shard; prepare the data again")
    width, vocab_size, count = struct.unpack("<IIQ", header[8:24])
    if width not in (2, 4) or size != HEADER + count * width:
        raise DataError(
            f"{path} is damaged: {size} bytes do not hold {count} ids of {width} bytes; "
            f"prepare the data again"
        )
    dtype = np.dtype(f"<u{width}")
    ids = np.memmap(path, dtype, "r", HEADER, count) if count else _empty(dtype)
    if header[24:] != _digest(header[:24], ids) + bytes(HEADER - 56):
        raise DataError(
            f"{path} is damaged: its sha256 is not the recorded one; prepare the data again"
        )
    largest = max((int(ids[i : i + _CHUNK].max()) for i in range(0, count, _CHUNK)), default=0)
    if largest >= vocab_size:
        raise DataError(f"{path} holds id {largest}, but its vocabulary has {vocab_size} tokens")
    return ids


def _digest(fields: bytes, ids: NDArray[Any]) -> bytes:
    sha = hashlib.sha256(fields)
    for start in range(0, ids.size, _CHUNK):
        sha.update(ids[start : start + _CHUNK].data)
    return sha.digest()


def _empty(dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.empty(0, dtype)
