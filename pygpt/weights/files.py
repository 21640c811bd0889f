"""Files on disk: safetensors and JSON, read with clear errors and written whole or not at all."""

from __future__ import annotations

import functools
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pygpt.errors import DataError, ResourceError
from pygpt.weights.layout import LazyTensor

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file."""
    refuse_stand_ins(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def refuse_stand_ins(path: Path) -> None:
    """Name a missing file, a git-lfs pointer and a web page for what they are."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path} is a web page, not weights; download the file itself")


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, memory-mapped."""
    refuse_stand_ins(path)
    dtypes = {code: dtype for dtype, code in _DTYPES.items()}
    result = {}
    try:
        file: Any = safe_open(path, framework="pt")
        expected = (file.metadata() or {}).get("crc32")
        if expected is not None and _crc32_of_data(path) != expected:
            raise DataError(f"{path} is damaged: its data is not what was saved (CRC-32 differs)")
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            part = file.get_slice(name)
            dtype = dtypes.get(part.get_dtype(), torch.uint8)  # else a mask, which is never read
            read = functools.partial(file.get_tensor, name)
            result[name] = LazyTensor(tuple(part.get_shape()), dtype, read)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from None
    return result


def _crc32_of_data(path: Path) -> str:
    crc = 0
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors one at a time, so that no second copy of the model is ever in memory.

    The header's metadata holds the CRC-32 of the data, which `read_safetensors` verifies.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "crc32": "00000000"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel * tensor.dtype.itemsize
        code = _DTYPES[tensor.dtype]
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = 0

    def data() -> Iterator[memoryview]:
        nonlocal crc
        for tensor in tensors.values():
            chunk = to_bytes(tensor)
            crc = zlib.crc32(chunk, crc)
            yield chunk

    def patch() -> tuple[int, bytes]:
        return 8 + text.index(b"00000000"), f"{crc:08x}".encode()

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
