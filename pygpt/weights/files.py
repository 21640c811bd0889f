"""Files on disk: safetensors and JSON, read with clear errors and written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pygpt.errors import DataError, ResourceError
from pygpt.ops.native import crc32c
from pygpt.weights.layout import LazyTensor, blaming

_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_CHECKSUMS = "tensors_crc32c"


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file."""
    refuse_stand_ins(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def refuse_stand_ins(path: Path) -> None:
    """Name a missing file, an empty one, a git-lfs pointer and a web page for what they are."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; was a copy or download cut short?")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path} is a web page, not weights; download the file itself")


def map_file(path: Path) -> Tensor:
    """The bytes of a file, memory-mapped; changes made to them do not reach it."""
    refuse_stand_ins(path)
    return torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)


def mapped(
    path: Path,
    name: str,
    data: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    checksum: int | None = None,
) -> LazyTensor:
    """The tensor in bytes of a file; reading it verifies its CRC-32C where that is known."""

    def read() -> Tensor:
        if checksum is not None and crc32c(data) != checksum:
            raise DataError(f"{path} is damaged: {name} is not what was saved (its CRC differs)")
        aligned = data.clone() if data.data_ptr() % dtype.itemsize else data
        return aligned.view(dtype).view(shape)

    return LazyTensor(shape, dtype, read)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, with the checksums that `write_safetensors` leaves in it."""
    data = map_file(path)
    try:
        with safe_open(path, framework="pt"):  # checks the header: sizes, overlaps, bounds
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from None
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    checksums = header.pop("__metadata__", {}).get(_CHECKSUMS, "").split()
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    if len(checksums) not in (0, len(header)):
        raise DataError(f"{path} has {len(checksums)} checksums for {len(header)} tensors")
    result = {}
    with blaming(path):
        for (name, entry), checksum in itertools.zip_longest(in_order, checksums):
            dtype = _DTYPES.get(entry["dtype"], torch.uint8)  # else a mask, which is never read
            first, end = entry["data_offsets"]
            part, crc = data[start + first : start + end], checksum and int(checksum, 16)
            result[name] = mapped(path, name, part, dtype, tuple(entry["shape"]), crc)
    return result


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors one at a time, so that no second copy of the model is ever in memory.

    The header's metadata holds the CRC-32C of each, in the order of the file.
    """
    blank = " ".join(["00000000"] * len(tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _CHECKSUMS: blank}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel * tensor.dtype.itemsize
        code = _CODES[tensor.dtype]
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    found: list[str] = []

    def data() -> Iterator[memoryview]:
        for tensor in tensors.values():
            content = to_bytes(tensor)
            found.append(f"{crc32c(content):08x}")
            yield content.numpy().data

    def patch() -> tuple[int, bytes]:
        return 8 + text.index(blank.encode()), " ".join(found).encode()

    write_whole(path, itertools.chain([len(text).to_bytes(8, "little"), text], data()), patch)


def to_bytes(tensor: LazyTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The bytes of the elements in row order, little-endian."""
    return tensor.load(dtype, "cpu").reshape(-1).view(torch.uint8)


def write_whole(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    patch: Callable[[], tuple[int, bytes]] | None = None,
) -> None:
    """Write a file under another name, and give it its own once all of it is on the disk.

    `patch` says, when all is written, what belongs at an earlier place.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            if patch is not None:
                at, late = patch()
                file.seek(at)
                file.write(late)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} could not be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
