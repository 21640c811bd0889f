"""GGUF, llama.cpp's format, written for its gpt2 architecture (ggml/docs/gguf.md, version 3)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pygpt.errors import DataError, UsageError
from pygpt.weights.files import read_json, to_bytes, write_whole
from pygpt.weights.layout import Checkpoint, LazyTensor, Table, export

TABLE = Table(
    "token_embd position_embd blk.*.attn_norm blk.*.attn_qkv blk.*.attn_output blk.*.ffn_norm "
    "blk.*.ffn_up blk.*.ffn_down output_norm output"
)

# name: (ggml type, general.file_type, elements in a block, bytes of a block)
TYPES = {"f32": (0, 0, 1, 4), "f16": (1, 1, 1, 2), "q8_0": (8, 7, 32, 34), "bf16": (30, 32, 1, 2)}
_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_ALIGNMENT = 32
# tokenizer.ggml.pre of the patterns that llama.cpp knows by name.
_GPT2_PATTERNS = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def write(path: Path, checkpoint: Checkpoint, kind: str, tokenizer: Path | None) -> None:
    """Write matrices as `kind`, all else as f32; with the vocabulary of a tokenizer.json."""
    config = checkpoint.config
    if config.exact_gelu:
        raise UsageError("llama.cpp's gpt2 has the tanh GELU; this model was trained with erf's")
    block = TYPES[kind][2]
    if config.emb_dim % block:
        raise UsageError(f"{kind} needs rows of a multiple of {block}, got {config.emb_dim}")
    tensors = export(TABLE, checkpoint.tensors, config.n_layers)
    if not config.qkv_bias:  # llama.cpp's gpt2 always has them
        zeros = LazyTensor.of(torch.zeros(3 * config.emb_dim))
        tensors |= {f"blk.{n}.attn_qkv.bias": zeros for n in range(config.n_layers)}
    kinds = {
        name: kind if len(tensor.shape) == 2 and name != "position_embd.weight" else "f32"
        for name, tensor in tensors.items()
    }
    values: dict[str, Any] = {
        "general.architecture": "gpt2",
        "general.name": checkpoint.path.stem,
        "general.file_type": TYPES[kind][1],
        "gpt2.context_length": config.context_length,
        "gpt2.embedding_length": config.emb_dim,
        "gpt2.feed_forward_length": 4 * config.emb_dim,
        "gpt2.block_count": config.n_layers,
        "gpt2.attention.head_count": config.n_heads,
        "gpt2.attention.layer_norm_epsilon": 1e-5,
        **({} if tokenizer is None else _tokenizer_values(tokenizer, config.vocab_size)),
    }
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        header += [_string(key), _value(value)]
    offset = 0
    for name, tensor in tensors.items():
        ggml_type, _, per_block, size = TYPES[kinds[name]]
        dims = tensor.shape[::-1]  # ggml counts from the innermost dimension
        header += [_string(name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        header.append(struct.pack("<IQ", ggml_type, offset))
        offset += _aligned(tensor.numel // per_block * size)
    head = b"".join(header)
    data = (_data(tensor, kinds[name]) for name, tensor in tensors.items())
    write_whole(path, itertools.chain([_pad(head)], itertools.chain.from_iterable(data)))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(data: bytes) -> bytes:
    return data + bytes(_aligned(len(data)) - len(data))


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


def _data(tensor: LazyTensor, kind: str) -> Iterator[bytes | memoryview]:
    data: bytes | memoryview
    if kind == "q8_0":
        data = quantize_q8_0(tensor.load(torch.float32, "cpu").numpy())
    else:
        data = to_bytes(tensor, _TORCH[kind]).numpy().data
    yield data
    yield bytes(_aligned(len(data)) - len(data))


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


def _tokenizer_values(path: Path, vocab_size: int) -> dict[str, Any]:
    raw = read_json(path)
    try:
        model, added = raw["model"], raw.get("added_tokens") or []
        vocab: dict[str, int] = model["vocab"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        specials = {token["content"]: int(token["id"]) for token in added}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a byte-level BPE tokenizer: {error!r}") from None
    if not _is_gpt2_pattern(raw.get("pre_tokenizer")):
        raise DataError(f"{path}: its split pattern is none that GGUF has a name for")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [5] * vocab_size  # unused
    for table, kind in ((vocab, 1), (specials, 3)):  # normal, control
        for token, number in table.items():
            if number >= vocab_size:
                raise DataError(f"{path}: id {number} is outside the model's {vocab_size} words")
            tokens[number], types[number] = token, kind
    end = specials.get("<|endoftext|>")
    ends = {f"tokenizer.ggml.{which}_token_id": end for which in ("bos", "eos")}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges or [""],
        **({} if end is None else ends),
    }


def _is_gpt2_pattern(pre_tokenizer: Any) -> bool:
    """Whether a pre_tokenizer of tokenizer.json splits as GPT-2 does."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    for step in steps:
        if step.get("type") == "Split":
            return step.get("pattern", {}).get("Regex") in _GPT2_PATTERNS
        if step.get("type") == "ByteLevel" and step.get("use_regex", True):
            return True
    return False
