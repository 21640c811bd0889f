"""TensorFlow's checkpoint bundles, read without TensorFlow.

The index is a LevelDB table (tensorflow/core/lib/io/table_format.txt) that maps each name to a
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto): type, shape, place in the data file
and CRC-32C (RFC 3720, appendix B.4). Every checksum is verified.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygpt.errors import DataError
from pygpt.ops.native import crc32c
from pygpt.weights.files import aligned, map_file
from pygpt.weights.layout import Check, blaming

_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES = {1: torch.float32, 19: torch.float16}  # DataType's numbers


def read_bundle(index: Path) -> tuple[dict[str, Tensor], list[Check]]:
    """The tensors of the TensorFlow checkpoint with an index, mapped, and their checksums."""
    tensors, checks = dict[str, Tensor](), list[Check]()
    n_shards = 1
    with blaming(index):
        for key, value in _table(map_file(index)):
            fields = dict(_message(value))
            if not key:
                n_shards = fields.get(1, 1)
                if fields.get(2):
                    raise ValueError("big-endian data")
                continue
            name, dtype = key.decode(), _DTYPES.get(fields.get(1, 0))
            if dtype is None:
                continue  # a counter or a string, which no model has use for
            dims = [dict(_message(dim)) for number, dim in _message(fields[2]) if number == 2]
            shape = tuple(dim.get(1, 0) for dim in dims)
            start, size = fields.get(4, 0), fields.get(5, 0)
            if size != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {size} bytes for shape {shape}")
            path = index.with_suffix(f".data-{fields.get(3, 0):05}-of-{n_shards:05}")
            data = map_file(path)[start : start + size]
            if len(data) < size:
                raise DataError(f"{path} ends within {name}")
            checks.append((path, name, data, _unmask(fields.get(6, 0))))
            tensors[name] = aligned(data).view(dtype).view(shape)
    return tensors, checks


# --- the table -----------------------------------------------------------------------------------


def _table(data: Tensor) -> Iterator[tuple[bytes, bytes]]:
    """Every (key, value) of a LevelDB table: footer -> index block -> data blocks."""
    footer = data[-48:].numpy().tobytes()
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != _TABLE_MAGIC:
        raise ValueError("no table magic at the end")
    _, _, start, size, _ = _varints(footer, 0, 4)  # first two: the meta index, which is empty
    for _, handle in _block(data, start, size):
        start, size, _ = _varints(handle, 0, 2)
        yield from _block(data, start, size)


def _block(data: Tensor, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries that share a prefix of their key with the one before, then restart points."""
    covered = data[start : start + size + 1]
    kind, crc = struct.unpack("<BI", data[start + size : start + size + 5].numpy().tobytes())
    if crc32c(covered) != _unmask(crc):
        raise ValueError("a block is damaged (its CRC-32C differs)")
    if kind:
        raise ValueError("the index is compressed")
    block = covered[:-1].numpy().tobytes()
    end = size - 4 * (1 + struct.unpack("<I", block[-4:])[0])
    at, key = 0, b""
    while at < end:
        shared, rest, length, at = _varints(block, at, 3)
        key = key[:shared] + block[at : at + rest]
        at += rest
        yield key, block[at : at + length]
        at += length


def _varints(data: bytes, at: int, count: int) -> list[int]:
    """So many integers of seven bits a byte, and where they end."""
    values = []
    for _ in range(count):
        start = at
        while data[at] >= 0x80:
            at += 1
        if at - start > 9:
            raise ValueError("a number of more than 64 bits")
        at += 1
        values.append(sum((data[i] & 0x7F) << 7 * (i - start) for i in range(start, at)))
    return [*values, at]


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protocol buffer message: integers, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varints(data, at, 1)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 5:
            yield number, struct.unpack_from("<I", data, at)[0]
            at += 4
        elif wire_type in (0, 2):
            value, at = _varints(data, at, 1)
            yield number, value if wire_type == 0 else data[at : at + value]
            at += value if wire_type == 2 else 0
        else:
            raise ValueError(f"unknown wire type {wire_type}")


def _unmask(stored: int) -> int:
    """Checksums are stored rotated and shifted, so that a checksum of one differs."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated << 15 | rotated >> 17) & 0xFFFFFFFF
