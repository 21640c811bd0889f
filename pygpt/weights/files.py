"""Files on disk: safetensors and JSON, read with clear errors and written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pygpt.errors import DataError, ResourceError
from pygpt.weights.layout import LazyTensor

_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


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


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, memory-mapped; changes made to them do not reach the file.

    Where the file holds checksums (see `write_safetensors`), reading a tensor verifies its own.
    """
    refuse_stand_ins(path)
    try:
        with safe_open(path, framework="pt"):  # checks the header: sizes, overlaps, bounds
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from None
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8:start].numpy().tobytes())
    checksums = header.pop("__metadata__", {}).get("tensors_crc32", "").split()
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    if len(checksums) not in (0, len(header)):
        raise DataError(f"{path} has {len(checksums)} checksums for {len(header)} tensors")
    return {
        name: _mapped(path, name, data, start, entry, crc)
        for (name, entry), crc in itertools.zip_longest(in_order, checksums)
    }


def _mapped(
    path: Path, name: str, data: Tensor, start: int, entry: Mapping[str, Any], crc: str | None
) -> LazyTensor:
    """One tensor of a header: `entry` tells its place in `data` after the header's end `start`."""
    dtype = _DTYPES.get(entry["dtype"], torch.uint8)  # else a mask, which is never read
    first, end = (start + offset for offset in entry["data_offsets"])
    shape = tuple(entry["shape"])

    def read() -> Tensor:
        part = data[first:end]
        if crc is not None and f"{zlib.crc32(part.numpy().data):08x}" != crc:
            raise DataError(f"{path} is damaged: {name} is not what was saved (its CRC differs)")
        return (part.clone() if first % dtype.itemsize else part).view(dtype).view(shape)

    return LazyTensor(shape, dtype, read)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors one at a time, so that no second copy of the model is ever in memory.

    The header's metadata holds the CRC-32 of each, in the order of the file.
    """
    blank = " ".join(["00000000"] * len(tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "tensors_crc32": blank}}
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
            chunk = to_bytes(tensor)
            found.append(f"{zlib.crc32(chunk):08x}")
            yield chunk

    def patch() -> tuple[int, bytes]:
        return 8 + text.index(blank.encode()), " ".join(found).encode()

    write_whole(path, itertools.chain([len(text).to_bytes(8, "little"), text], data()), patch)


def to_bytes(tensor: LazyTensor, dtype: torch.dtype | None = None) -> memoryview:
    """The elements in row order, little-endian."""
    return tensor.load(dtype, "cpu").reshape(-1).view(torch.uint8).numpy().data


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
