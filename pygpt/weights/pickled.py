"""PyTorch's pickled files, read with `weights_only` and only by `convert` and `info`.

They hold the book's state dicts (plain, or with its LoRA), nanoGPT's ckpt.pt, minGPT's model.pt, or
pytorch_model.bin of transformers; which one, its names and shapes tell.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygpt.config import GPT2_SIZES, GPTConfig
from pygpt.errors import DataError, UsageError
from pygpt.weights import huggingface
from pygpt.weights.files import refuse_stand_ins
from pygpt.weights.layout import Checkpoint, Table, adopt, blaming, shapes

BOOK = Table(
    "norm1.weight=norm1.scale norm1.bias=norm1.shift norm2.weight=norm2.scale "
    "norm2.bias=norm2.shift final_norm.weight=final_norm.scale final_norm.bias=final_norm.shift "
    "blocks=trf_blocks att.qkv=att.W_* att.out=att.out_proj ff.up=ff.layers.0 ff.down=ff.layers.2",
    ignore=r"trf_blocks\.\d+\.att\.mask",
    stacked=("query", "key", "value"),
)

# nanoGPT and minGPT call everything as Hugging Face does, in nn.Linear's orientation.
LINEAR = replace(huggingface.TABLE, transposed=False)


def recognises(head: bytes) -> bool:
    """Whether a file begins as a zip archive or bare pickle, as torch.save writes them."""
    return head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"))


def read(path: Path, *, n_heads: int | None, lora_scale: float | None) -> Checkpoint:
    """The model in a pickled file.

    State dicts do not tell the number of heads: it is known for the sizes of GPT-2 and must be
    given for others. `lora_scale` is what the book's x A B is multiplied by, its alpha.
    """
    raw = _unpickle(path)
    found = [raw[key] for key in ("model_state_dict", "model", "state_dict") if key in raw]
    state = found[0] if found and isinstance(found[0], Mapping) else raw
    tensors = {
        re.sub(r"^(_orig_mod\.|module\.|transformer\.)*", "", name): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    with blaming(path):
        for name, tensor in tensors.items():  # a bomb: small in the file, and vast
            if tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
                raise DataError(f"{path}: {name} of shape {tuple(tensor.shape)} has not the data")
        if any(name.startswith("trf_blocks.") for name in tensors):
            return _read_book(path, _merge_lora(tensors, lora_scale), n_heads)
        attention = tensors.get("h.0.attn.c_attn.weight")
        if attention is None or len(attention.shape) != 2:
            raise DataError(
                f"{path} holds neither a state dict of the book, nor of nanoGPT, minGPT or "
                f"transformers' GPT-2; its first names are {', '.join([*tensors][:4]) or 'none'}"
            )
        if attention.shape[0] < attention.shape[1]:  # Conv1D: (C, 3 C)
            return huggingface.adopt_beside(tensors, path, "PyTorch file of transformers")
        return _read_linear(path, tensors, raw.get("model_args"), n_heads)


def _unpickle(path: Path) -> Mapping[str, Any]:
    refuse_stand_ins(path)
    mappable = zipfile.is_zipfile(path)  # not so before PyTorch 1.6
    try:
        if mappable and (damaged := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a file that is cut or altered raises almost anything
        why = str(error).partition("\n")[0]
        raise DataError(
            f"{path} is damaged, or holds more than tensors, and was not loaded: {why}"
        ) from error
    if not isinstance(raw, Mapping):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected a state dict")
    return raw


def _config(
    path: Path, names: list[str], tensors: Mapping[str, Tensor], n_heads: int | None, **rest: Any
) -> GPTConfig:
    """A configuration with the sizes of two embeddings, and as many blocks as there are."""
    (vocab_size, emb_dim), (context_length, _) = (tensors[name].shape for name in names)
    known = {size["emb_dim"]: size["n_heads"] for size in GPT2_SIZES.values()}
    if n_heads is None and emb_dim not in known:
        raise UsageError(f"{path} does not tell its number of attention heads; give n_heads")
    blocks = {found[0] for name in tensors if (found := re.match(r"(trf_blocks|h)\.\d+\.", name))}
    n_heads = known[emb_dim] if n_heads is None else n_heads
    return GPTConfig(vocab_size, context_length, emb_dim, n_heads, len(blocks), **rest)


def _read_book(path: Path, tensors: dict[str, Tensor], n_heads: int | None) -> Checkpoint:
    classifies = "out_head.bias" in tensors  # classes in place of words
    biased = "trf_blocks.0.att.W_query.bias" in tensors
    names = ["tok_emb.weight", "pos_emb.weight"]
    config = _config(path, names, tensors, n_heads, qkv_bias=biased, tie_weights=classifies)
    if not classifies:
        return adopt(BOOK, tensors, config, path, "state dict of the book")
    head = {name: tensors.pop(f"out_head.{name}") for name in ("weight", "bias")}
    return adopt(BOOK, tensors, config, path, "state dict of the book").classifying(head)


def _merge_lora(tensors: Mapping[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Fold `linear.weight + scale (A B)^T` of the book's LinearWithLoRA into one weight."""
    merged = {}
    for name, tensor in tensors.items():
        base, inner, kind = name.rpartition(".linear.")
        if kind == "weight" and f"{base}.lora.A" in tensors:
            if scale is None or not math.isfinite(scale):
                raise UsageError(
                    f"the state dict has LoRA matrices ({base}.lora.A) but not their scale; "
                    f"give lora_scale (the book's alpha, 16)"
                )
            a, b = tensors[f"{base}.lora.A"], tensors[f"{base}.lora.B"]
            tensor = tensor + scale * (a @ b).T
        if ".lora." not in name:
            merged[f"{base}.{kind}" if inner else name] = tensor
    return merged


def _read_linear(
    path: Path, tensors: dict[str, Tensor], arguments: Any, n_heads: int | None
) -> Checkpoint:
    nano = isinstance(arguments, Mapping)  # nanoGPT says its shape, and its GELU is exact
    config = _config(
        path,
        ["wte.weight", "wpe.weight"],
        tensors,
        arguments.get("n_head") if nano else n_heads,
        drop_rate=arguments.get("dropout", 0.0) if nano else GPTConfig.drop_rate,
        qkv_bias="h.0.attn.c_attn.bias" in tensors,
        tie_weights=True,
        exact_gelu=nano,
    )
    if "ln_f.bias" not in tensors:  # nanoGPT's bias=False: no bias anywhere
        names, dtype = LINEAR.names(config), tensors["wte.weight"].dtype
        for ours, shape in shapes(config).items():
            if ours.endswith("bias"):
                tensors.setdefault(names[ours][0], torch.zeros(shape, dtype=dtype))
    return adopt(LINEAR, tensors, config, path, "nanoGPT" if nano else "minGPT")
