"""llm.c's .bin: a header of 256 integers, then every kind of parameter for all layers at once."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.weights.layout import Checkpoint, LazyTensor, Table, blaming, shapes

MAGIC = 20240326
_HEADER = 1024


def read(path: Path) -> Checkpoint:
    """The model in an llm.c checkpoint; its padded vocabulary is cut back to the real one."""
    with path.open("rb") as file:
        head = file.read(_HEADER)
    if len(head) < _HEADER:
        raise DataError(f"{path} ends within its header")
    _, version, context, vocab, layers, heads, width, padded = struct.unpack("<8i", head[:32])
    if not 1 <= version <= 5:
        raise DataError(f"{path}: unknown version {version} of llm.c's format")
    padded = padded or vocab  # versions 1 and 2 had no padding
    with blaming(path):
        config = GPTConfig(
            vocab, context, width, heads, layers, drop_rate=0.0, qkv_bias=True, tie_weights=True
        )
    count = (padded + context + 2 + layers * (12 * width + 13)) * width
    size = path.stat().st_size
    # The meaning of a version number has changed over time; the size of the file is plain.
    dtype = {_HEADER + 4 * count: torch.float32, _HEADER + 2 * count: torch.bfloat16}.get(size)
    if padded < vocab or dtype is None:
        raise DataError(
            f"{path} has {size} bytes; its header describes {_HEADER + 4 * count} (fp32) or "
            f"{_HEADER + 2 * count} (bf16)"
        )
    wanted = shapes(config)
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[_HEADER:].view(dtype)
    padding = (padded - vocab) * width
    tensors, start = {}, 0
    for name, _, _ in Table().names(layers):  # the order of the file
        if name in wanted:
            size = math.prod(wanted[name])
            tensors[name] = LazyTensor.of(data[start : start + size].view(wanted[name]))
            start += size + (padding if name == "tok_emb.weight" else 0)
    return Checkpoint(path, "llm.c", config, {name: tensors[name] for name in wanted})
