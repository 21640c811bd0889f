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

import torch
from torch import Tensor

from pygpt.errors import DataError
from pygpt.ops.native import crc32c
from pygpt.weights.files import aligned, map_file
from pygpt.weights.layout import Check, blaming

_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES = {1: torch.float32, 19: torch.float16}  # DataType's numbers


def read_bundle(index: Path) -> tuple[dict[str, Tensor], list[Check]]:
    """The tensors of the TensorFlow checkpoint whose index is given, mapped, and their checks."""
    tensors: dict[str, Tensor] = {}
    checks: list[Check] = []
    n_shards = 1
    with blaming(index):
        for key, value in _table(index.read_bytes()):
            fields = dict(_message(value))
            if not key:
                n_shards = int(fields.get(1, 1))
                if fields.get(2, 0):
                    raise ValueError("big-endian data")
                continue
            name, dtype = key.decode(), _DTYPES.get(int(fields.get(1, 0)))
            if dtype is None:
                continue  # a counter or a string, which no model has use for
            shape = tuple(
                int(dict(_message(dim)).get(1, 0))
                for number, dim in _message(fields.get(2, b""))
                if number == 2
            )
            start, size = int(fields.get(4, 0)), int(fields.get(5, 0))
            if size != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {size} bytes for shape {shape}")
            path = index.with_suffix(f".data-{int(fields.get(3, 0)):05}-of-{n_shards:05}")
            data = map_file(path)[start : start + size]
            if len(data) < size:
                raise DataError(f"{path} ends within {name}")
            checks.append((path, name, data, _unmask(int(fields.get(6, 0)))))
            tensors[name] = aligned(data).view(dtype).view(shape)
    return tensors, checks


# --- the table -----------------------------------------------------------------------------------


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every (key, value) of a LevelDB table: footer -> index block -> data blocks."""
    footer = data[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != _TABLE_MAGIC:
        raise ValueError("no table magic at the end")
    _, _, start, size, _ = _varints(footer, 0, 4)  # first two: the meta index, which is empty
    for _, handle in _block(data, start, size):
        start, size, _ = _varints(handle, 0, 2)
        yield from _block(data, start, size)


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Entries that share a prefix of their key with the one before, then restart points."""
    block, trailer = data[start : start + size], data[start + size : start + size + 5]
    kind, crc = struct.unpack("<BI", trailer)
    covered = torch.frombuffer(bytearray(block + trailer[:1]), dtype=torch.uint8)
    if crc32c(covered) != _unmask(crc):
        raise ValueError("a block is damaged (its CRC-32C differs)")
    if kind:
        raise ValueError("the index is compressed")
    end = len(block) - 4 * (1 + struct.unpack("<I", block[-4:])[0])
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
        value = shift = 0
        while data[at] >= 0x80:
            value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
        values.append(value | data[at] << shift)
        at += 1
    return [*values, at]


def _message(data: object) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of a protocol buffer message."""
    if not isinstance(data, bytes):
        raise ValueError("a message was expected")
    at = 0
    while at < len(data):
        tag, at = _varints(data, at, 1)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varints(data, at, 1)
        elif tag & 7 == 2:
            size, at = _varints(data, at, 1)
            value, at = data[at : at + size], at + size
        elif tag & 7 == 5:
            value, at = struct.unpack_from("<I", data, at)[0], at + 4
        else:
            raise ValueError(f"unknown wire type {tag & 7}")
        yield tag >> 3, value


def _unmask(stored: int) -> int:
    """Checksums are stored rotated and shifted, so that a checksum of one differs."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated << 15 | rotated >> 17) & 0xFFFFFFFF
