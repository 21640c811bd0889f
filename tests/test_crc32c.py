"""CRC-32C: RFC 3720's vectors, and every cut into streams and pieces against one byte at a time."""

import numpy as np
import pytest
import torch

from pygpt.ops.native import crc32c

TABLE = []
for number in range(256):
    for _ in range(8):
        number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
    TABLE.append(number)


def byte_by_byte(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = state >> 8 ^ TABLE[(state ^ byte) & 255]
    return state ^ 0xFFFFFFFF


def test_rfc_3720s_checksums_are_exact():
    ascending = torch.arange(32, dtype=torch.uint8)
    read_command = bytes.fromhex(
        "01c00000000000000000000000000000140000000000040000000014000000182800000000000000"
        "0200000000000000"
    )
    for data, checksum in (
        (torch.zeros(32, dtype=torch.uint8), 0x8A9136AA),
        (torch.full((32,), 255, dtype=torch.uint8), 0x62A8AB43),
        (ascending, 0x46DD794E),
        (ascending.flip(0), 0x113FDB5C),
        (torch.tensor(list(read_command), dtype=torch.uint8), 0xD9963A56),
        (torch.empty(0, dtype=torch.uint8), 0),
    ):
        assert crc32c(data) == checksum


STREAMS, PIECE = 3 * 32704, 1 << 20


@pytest.mark.parametrize(
    "size", [1, 7, 8, 9, 4097, STREAMS - 1, STREAMS, STREAMS + 9, PIECE, PIECE + 1, 3 * PIECE - 5]
)
@pytest.mark.parametrize("start", [0, 3])
def test_streams_and_pieces_are_exact(size: int, start: int):
    data = np.random.default_rng(size).integers(0, 256, start + size, dtype=np.uint8)
    assert crc32c(torch.from_numpy(data)[start:]) == byte_by_byte(data[start:].tobytes())


def test_any_number_of_pieces_is_exact():
    zeros = torch.zeros(70 * PIECE + 11, dtype=torch.uint8)  # more than are summed apart
    zeros[-3] = 1
    whole = crc32c(zeros)
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        assert crc32c(zeros) == whole
        torch.set_num_threads(before)
    # A change at either end is seen, and is the same change wherever the pieces begin.
    zeros[0] ^= 1
    assert crc32c(zeros) != whole
    zeros[0] ^= 1
    assert crc32c(zeros[5:]) != whole
