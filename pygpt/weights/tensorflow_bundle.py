"""TensorFlow's checkpoint bundles, read without TensorFlow.

The index is a LevelDB table (tensorflow/core/lib/io/table_format.txt) that maps each name to a
BundleEntryProto (tensorflow/core/protobuf/tensor_bundle.proto): type, shape, place in the data file
and CRC-32C (RFC 3720, appendix B.4). Every checksum is verified.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygpt.errors import DataError
from pygpt.weights.layout import LazyTensor, blaming

_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES = {1: (np.float32, torch.float32), 19: (np.float16, torch.float16)}  # DataType's numbers


def read_bundle(index: Path) -> dict[str, LazyTensor]:
    """The tensors of the TensorFlow checkpoint whose index is given, memory-mapped."""
    data = index.read_bytes()
    result = {}
    n_shards = 1
    with blaming(index):
        for key, value in _table(data):
            fields = dict(_message(value))
            if not key:
                n_shards = int(fields.get(1, 1))
                if fields.get(2, 0):
                    raise ValueError("big-endian data")
                continue
            name = key.decode()
            if fields.get(1) not in _DTYPES:
                continue  # a counter or a string, which no model has use for
            numpy_dtype, dtype = _DTYPES[int(fields[1])]
            shape = tuple(
                int(dict(_message(dim)).get(1, 0))
                for number, dim in _message(fields.get(2, b""))
                if number == 2
            )
            path = index.with_suffix(f".data-{int(fields.get(3, 0)):05}-of-{n_shards:05}")
            if not path.is_file():
                raise FileNotFoundError(f"{path} does not exist")
            start, size = int(fields.get(4, 0)), int(fields.get(5, 0))
            count = int(np.prod(shape, dtype=object))
            if size != count * np.dtype(numpy_dtype).itemsize:
                raise ValueError(f"{name} has {size} bytes for shape {shape}")
            if start + size > path.stat().st_size:
                raise DataError(f"{path} ends within {name}")
            read = functools.partial(
                _read, path, name, start, size, int(fields.get(6, 0)), numpy_dtype, shape
            )
            result[name] = LazyTensor(shape, dtype, read)
    return result


def _read(
    path: Path, name: str, start: int, size: int, crc: int, dtype: type, shape: tuple[int, ...]
) -> Tensor:
    data = np.memmap(path, np.uint8, "c", start, (size,))
    if _mask(crc32c(data)) != crc:
        raise DataError(f"{path}: {name} is damaged (its CRC-32C differs)")
    aligned = data if start % np.dtype(dtype).itemsize == 0 else data.copy()
    return torch.from_numpy(aligned.view(dtype).reshape(shape))


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
    if _mask(crc32c(np.frombuffer(block + trailer[:1], np.uint8))) != crc:
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


# --- CRC-32C -------------------------------------------------------------------------------------

_LANE = 512  # bytes


@functools.cache
def _crc_tables() -> tuple[np.ndarray, np.ndarray]:
    """The checksum's step over two bytes, and (as 32 columns) over `_LANE` zero bytes."""
    one: Any = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        one = (one >> 1) ^ np.where(one & 1, np.uint32(0x82F63B78), np.uint32(0))
    state: Any = np.arange(65536, dtype=np.uint32)
    for _ in range(2):
        state = one[state & 0xFF] ^ (state >> 8)
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)
    columns = one[columns & 0xFF] ^ (columns >> 8)
    for _ in range(_LANE.bit_length() - 1):
        columns = _apply(columns, columns)
    return state, columns


def _apply(columns: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map over bits, to each of `states`."""
    result = np.zeros_like(states)
    for bit in range(32):
        result ^= np.where((states >> np.uint32(bit)) & 1, columns[bit], np.uint32(0))
    return result


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C of bytes: many lanes side by side, then folded, at about 1 ns a byte.

    >>> hex(crc32c(np.frombuffer(b"123456789", np.uint8)))
    '0xe3069283'
    """
    two_bytes, lane_shift = _crc_tables()
    state = np.array([0xFFFFFFFF], np.uint32)
    while data.size >= 2 * _LANE:
        lanes = 1 << (min(data.size // _LANE, 16384).bit_length() - 1)
        block, data = data[: lanes * _LANE], data[lanes * _LANE :]
        states = np.zeros(lanes, np.uint32)
        for pair in block.view("<u2").reshape(lanes, -1).T.copy():
            states = two_bytes.take(states.astype(np.uint16) ^ pair) ^ (states >> 16)
        shift = lane_shift
        while len(states) > 1:
            states = _apply(shift, states[0::2]) ^ states[1::2]
            shift = _apply(shift, shift)
        state = _apply(shift, state) ^ states
    last = int(state[0])
    for byte in data.tolist():
        last ^= byte
        for _ in range(8):
            last = (last >> 1) ^ (0x82F63B78 if last & 1 else 0)
    return last ^ 0xFFFFFFFF


def _mask(crc: int) -> int:
    """TensorFlow stores checksums rotated and shifted, so that a checksum of one differs."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
