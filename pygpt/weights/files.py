"""Files on disk: safetensors and JSON, read with clear errors and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pygpt.errors import DataError, ResourceError
from pygpt.ops.native import crc32c
from pygpt.weights.layout import DTYPES, Check, blaming

_CODES = {dtype: name.upper() for name, dtype in DTYPES.items()}
_CHECKSUMS = "tensors_crc32c"


def read_bytes(path: Path) -> bytes:
    """A small file."""
    refuse_stand_ins(path)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file."""
    try:
        raw = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected an object")
    return raw


def refuse_stand_ins(path: Path) -> bytes:
    """The first bytes of a file.

    Names a missing file, an empty one, a git-lfs pointer and a web page for what they are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        head = file.read(64)
    text = head.lstrip().lower()
    if not head:
        raise DataError(f"{path} is empty; was a copy or download cut short?")
    if text.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path} is a web page, not weights; download the file itself")
    return head


def map_file(path: Path) -> Tensor:
    """The bytes of a file, memory-mapped; changes made to them do not reach it."""
    refuse_stand_ins(path)
    return torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)


def read_safetensors(*paths: Path) -> tuple[dict[str, Tensor], list[Check]]:
    """The tensors of files, mapped, and the checksums that `write_safetensors` leaves in one."""
    tensors, checks = dict[str, Tensor](), list[Check]()
    for path in paths:
        refuse_stand_ins(path)
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not a whole safetensors file: {error}") from None
        names, sums = file.offset_keys(), (file.metadata() or {}).get(_CHECKSUMS, "").split()
        if len(sums) not in (0, len(names)):
            raise DataError(f"{path} has {len(sums)} checksums for {len(names)} tensors")
        tensors |= {name: aligned(file.get_tensor(name)) for name in names}
        with blaming(path):
            for name, checksum in zip(names, sums, strict=False):
                checks.append((path, name, tensors[name], int(checksum, 16)))
    return tensors, checks


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it lies askew in its file."""
    return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write tensors one at a time, so that no second copy of the model is ever in memory.

    The header's metadata holds the CRC-32C of each, in the order of the file.
    """
    blank = " ".join(["00000000"] * len(tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _CHECKSUMS: blank}}
    end = 0
    for name, tensor in tensors.items():
        stored = dtype or tensor.dtype
        start, end = end, end + tensor.numel() * stored.itemsize
        code = _CODES[stored]
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = []
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            content = to_bytes(tensor, dtype)
            checksums.append(f"{crc32c(content):08x}")
            file.write(content.numpy().data)
        file.seek(8 + text.index(blank.encode()))
        file.write(" ".join(checksums).encode())


def to_bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The bytes of the elements in row order, little-endian."""
    return tensor.detach().to("cpu", dtype).contiguous().flatten().view(torch.uint8)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    write_bytes(path, json.dumps(value, indent=2).encode() + b"\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write under another name, which gets its own once all of it is on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"{path} could not be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
