"""GGUF, llama.cpp's format, written for its gpt2 architecture (ggml/docs/gguf.md, version 3)."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pygpt.errors import DataError, UsageError
from pygpt.tokenizer import EOT, Tokenizer
from pygpt.tokenizer.patterns import native_name
from pygpt.weights.files import replacing, to_bytes
from pygpt.weights.layout import DTYPES, Checkpoint, Table, export

TABLE = Table(
    "tok_emb=token_embd pos_emb=position_embd blocks=blk norm1=attn_norm att.qkv=attn_qkv "
    "att.out=attn_output norm2=ffn_norm ff.up=ffn_up ff.down=ffn_down final_norm=output_norm "
    "out_head=output"
)

# name: (ggml type, general.file_type, elements in a block, bytes of a block)
TYPES = {"f32": (0, 0, 1, 4), "f16": (1, 1, 1, 2), "q8_0": (8, 7, 32, 34), "bf16": (30, 32, 1, 2)}
_ALIGNMENT = 32
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # types of tokens


def write(path: Path, checkpoint: Checkpoint, kind: str, tokenizer: Tokenizer | None) -> None:
    """Write matrices as `kind`, all else as f32; with the vocabulary of a tokenizer."""
    config, (_, file_type, block, _) = checkpoint.config, TYPES[kind]
    if config.exact_gelu:
        raise UsageError("llama.cpp's gpt2 has the tanh GELU; this model was trained with erf's")
    if checkpoint.classifier is not None:
        raise UsageError(f"{checkpoint.path} classifies, which llama.cpp's gpt2 cannot")
    if config.emb_dim % block:
        raise UsageError(f"{kind} needs rows of a multiple of {block}, got {config.emb_dim}")
    tensors = {
        name: (tensor, kind if tensor.dim() == 2 and name != "position_embd.weight" else "f32")
        for name, tensor in export(TABLE, checkpoint).items()
    }
    values: dict[str, Any] = {
        "general.architecture": "gpt2",
        "general.name": checkpoint.path.stem,
        "general.file_type": file_type,
        "gpt2.context_length": config.context_length,
        "gpt2.embedding_length": config.emb_dim,
        "gpt2.feed_forward_length": 4 * config.emb_dim,
        "gpt2.block_count": config.n_layers,
        "gpt2.attention.head_count": config.n_heads,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        **({} if tokenizer is None else _tokenizer_values(tokenizer, config.vocab_size)),
    }
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    head += [_string(key) + _value(value) for key, value in values.items()]
    offset = 0
    for name, (tensor, stored) in tensors.items():
        ggml_type, _, per_block, size = TYPES[stored]
        dims = tensor.shape[::-1]  # ggml counts from the innermost dimension
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)
        head.append(_string(name) + place)
        size *= tensor.numel() // per_block
        offset += size + -size % _ALIGNMENT
    with replacing(path) as file:
        for data in itertools.chain([b"".join(head)], itertools.starmap(_data, tensors.values())):
            file.write(data)
            file.write(bytes(-len(data) % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """The type of a metadata value, then the value: uint32, float32, string, or an array."""
    match value:
        case str():
            return struct.pack("<I", 8) + _string(value)
        case float():
            return struct.pack("<If", 6, value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case [*_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)  # of int32
    return struct.pack("<II", 4, value)


def _data(tensor: Tensor, kind: str) -> bytes | memoryview:
    if kind == "q8_0":
        return quantize_q8_0(tensor.float().numpy())
    return to_bytes(tensor, DTYPES[kind]).numpy().data


def quantize_q8_0(weights: np.ndarray) -> bytes:
    """Blocks of 32: a half-precision scale, then 32 integers in -127..127."""
    blocks = weights.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse
    rounded = np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)  # halves away from zero, as ggml
    packed = np.empty(len(blocks), np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    packed["scale"] = scale[:, 0]
    packed["values"] = rounded
    return packed.tobytes()


def _tokenizer_values(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    raw = tokenizer.to_hugging_face()
    if native_name(tokenizer._pat_str) != "gpt2" or raw["model"]["ignore_merges"]:
        raise DataError(f"{tokenizer.name}: llama.cpp splits text as GPT-2 does, not as this one")
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for table, kind in ((raw["model"]["vocab"], _NORMAL), (special, _CONTROL)):
        for token, number in table.items():
            tokens[number], types[number] = token, kind
    ends = [f"tokenizer.ggml.{which}_token_id" for which in ("bos", "eos") if EOT in special]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]] or [""],
        **dict.fromkeys(ends, special.get(EOT)),
    }
