"""llm.c's .bin: a header of 256 integers, then every kind of parameter for all layers at once."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import torch

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.weights.files import map_file
from pygpt.weights.layout import Checkpoint, blaming, shapes

MAGIC = struct.pack("<i", 20240326)
_HEADER = 1024


def read(path: Path) -> Checkpoint:
    """The model in an llm.c checkpoint; its padded vocabulary is cut back to the real one."""
    content = map_file(path)
    with blaming(path):
        header = content[4:32].view(torch.int32).tolist()
        version, context, vocab, layers, heads, width, padded = header
        if not 1 <= version <= 5:
            raise ValueError(f"unknown version {version} of llm.c's format")
        padded = padded or vocab  # versions 1 and 2 had no padding
        config = GPTConfig(
            vocab, context, width, heads, layers, drop_rate=0.0, qkv_bias=True, tie_weights=True
        )
    count = (padded + context + 2 + layers * (12 * width + 13)) * width
    # The meaning of a version number has changed over time; the size of the file is plain.
    sizes = {_HEADER + 4 * count: torch.float32, _HEADER + 2 * count: torch.bfloat16}
    if padded < vocab or len(content) not in sizes:
        fp32, bf16 = sizes
        raise DataError(
            f"{path} has {len(content)} bytes; its header describes {fp32} (fp32) or {bf16} (bf16)"
        )
    data, start = content[_HEADER:].view(sizes[len(content)]), 0
    tensors = {}
    for kind, shape in shapes(replace(config, n_layers=1)).items():  # in the order of the file
        for number in range(layers if kind.startswith("blocks.") else 1):
            end = start + math.prod(shape)
            tensors[kind.replace(".0.", f".{number}.")] = data[start:end].view(shape)
            start = end
        if kind == "tok_emb.weight":
            start += (padded - vocab) * width
    return Checkpoint(path, "llm.c", config, tensors)
