"""PyTorch's pickled files, read with `weights_only` and only by `convert`.

They hold the book's state dicts (plain, or with its LoRA), nanoGPT's ckpt.pt, minGPT's model.pt, or
pytorch_model.bin of transformers; which one, its names and shapes tell.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygpt.config import GPT2_SIZES, GPTConfig
from pygpt.errors import DataError, UsageError
from pygpt.weights import huggingface
from pygpt.weights.files import read_json, refuse_stand_ins
from pygpt.weights.layout import Checkpoint, LazyTensor, Rule, adopt

BOOK_RULES = (
    Rule("tok_emb.weight", "tok_emb.weight"),
    Rule("pos_emb.weight", "pos_emb.weight"),
    Rule("blocks.*.norm1.weight", "trf_blocks.*.norm1.scale"),
    Rule("blocks.*.norm1.bias", "trf_blocks.*.norm1.shift"),
    Rule(
        "blocks.*.att.qkv.weight",
        (
            "trf_blocks.*.att.W_query.weight",
            "trf_blocks.*.att.W_key.weight",
            "trf_blocks.*.att.W_value.weight",
        ),
    ),
    Rule(
        "blocks.*.att.qkv.bias",
        (
            "trf_blocks.*.att.W_query.bias",
            "trf_blocks.*.att.W_key.bias",
            "trf_blocks.*.att.W_value.bias",
        ),
    ),
    Rule("blocks.*.att.out.weight", "trf_blocks.*.att.out_proj.weight"),
    Rule("blocks.*.att.out.bias", "trf_blocks.*.att.out_proj.bias"),
    Rule("blocks.*.norm2.weight", "trf_blocks.*.norm2.scale"),
    Rule("blocks.*.norm2.bias", "trf_blocks.*.norm2.shift"),
    Rule("blocks.*.ff.up.weight", "trf_blocks.*.ff.layers.0.weight"),
    Rule("blocks.*.ff.up.bias", "trf_blocks.*.ff.layers.0.bias"),
    Rule("blocks.*.ff.down.weight", "trf_blocks.*.ff.layers.2.weight"),
    Rule("blocks.*.ff.down.bias", "trf_blocks.*.ff.layers.2.bias"),
    Rule("final_norm.weight", "final_norm.scale"),
    Rule("final_norm.bias", "final_norm.shift"),
    Rule("out_head.weight", "out_head.weight"),
)
_BOOK_MASKS = r"trf_blocks\.\d+\.att\.mask"

# nanoGPT and minGPT call everything as Hugging Face does, in nn.Linear's orientation.
LINEAR_RULES = tuple(replace(rule, transposed=False) for rule in huggingface.RULES)
_LINEAR_MASKS = r"h\.\d+\.attn\.bias"


def read(path: Path, *, n_heads: int | None, lora_scale: float | None) -> Checkpoint:
    """The model in a pickled file.

    State dicts do not tell the number of heads: it is known for the sizes of GPT-2 and must be
    given for others. `lora_scale` is what the book's x A B is multiplied by, its alpha.
    """
    raw = _unpickle(path)
    state = raw
    for key in ("model_state_dict", "model", "state_dict"):
        if isinstance(raw.get(key), Mapping):
            state = raw[key]
    tensors = {
        re.sub(r"^(_orig_mod\.|module\.|transformer\.)*", "", name): LazyTensor.of(tensor)
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    arguments = raw.get("model_args")
    if any(name.startswith("trf_blocks.") for name in tensors):
        return _read_book(path, _merge_lora(tensors, lora_scale), n_heads)
    attention = tensors.get("h.0.attn.c_attn.weight")
    if attention is None or len(attention.shape) != 2:
        raise DataError(
            f"{path} holds neither a state dict of the book, nor of nanoGPT, minGPT or "
            f"transformers' GPT-2; its first names are {', '.join([*tensors][:4]) or 'none'}"
        )
    if attention.shape[0] < attention.shape[1]:  # Conv1D: (C, 3 C)
        config = huggingface.config_from_json(
            read_json(path.parent / huggingface.CONFIG), path.parent / huggingface.CONFIG
        )
        return huggingface.adopt_tensors(tensors, config, path, "PyTorch file of transformers")
    return _read_linear(path, tensors, arguments, n_heads)


def _unpickle(path: Path) -> Mapping[str, Any]:
    refuse_stand_ins(path)
    try:
        try:
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # files of before PyTorch 1.6
                raise
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors, or is damaged, and was not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a whole PyTorch file: {error}") from error
    if not isinstance(raw, Mapping):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected a state dict")
    return raw


def _heads(path: Path, emb_dim: int, n_heads: int | None) -> int:
    known = {size["emb_dim"]: size["n_heads"] for size in GPT2_SIZES.values()}
    if n_heads is None and emb_dim not in known:
        raise UsageError(f"{path} does not tell its number of attention heads; give n_heads")
    return n_heads or known[emb_dim]


def _layers(tensors: Mapping[str, LazyTensor], pattern: str) -> int:
    numbers = [int(m[1]) for name in tensors if (m := re.match(pattern, name))]
    return 1 + max(numbers, default=-1)


def _config(
    path: Path, tensors: Mapping[str, LazyTensor], names: tuple[str, str], **rest: Any
) -> GPTConfig:
    """A configuration whose sizes are those of the two embeddings."""
    for name in names:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise DataError(f"{path}: missing: {name}")
    vocab_size, emb_dim = tensors[names[0]].shape
    try:
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=tensors[names[1]].shape[0],
            emb_dim=emb_dim,
            n_heads=_heads(path, emb_dim, rest.pop("n_heads")),
            **rest,
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _read_book(path: Path, tensors: Mapping[str, LazyTensor], n_heads: int | None) -> Checkpoint:
    classifier = None
    if "out_head.bias" in tensors:  # classes stand where the words were
        classifier = {name: tensors[f"out_head.{name}"] for name in ("weight", "bias")}
        tensors = {n: t for n, t in tensors.items() if not n.startswith("out_head.")}
    config = _config(
        path,
        tensors,
        ("tok_emb.weight", "pos_emb.weight"),
        n_heads=n_heads,
        n_layers=_layers(tensors, r"trf_blocks\.(\d+)\."),
        qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
        tie_weights=classifier is not None,
    )
    renamed = adopt(BOOK_RULES, tensors, config, path, ignore=_BOOK_MASKS)
    return Checkpoint(path, "state dict of the book", config, renamed, classifier)


def _merge_lora(tensors: Mapping[str, LazyTensor], scale: float | None) -> Mapping[str, LazyTensor]:
    """Fold `linear.weight + scale (A B)^T` of the book's LinearWithLoRA into one weight."""
    merged = {}
    for name, tensor in tensors.items():
        base, dot, kind = name.rpartition(".linear.")
        if not dot:
            if ".lora." not in name:
                merged[name] = tensor
            continue
        if kind == "weight" and f"{base}.lora.A" in tensors:
            if scale is None:
                raise UsageError(
                    f"the state dict has LoRA matrices ({base}.lora.A) but not their scale; "
                    f"give lora_scale (the book's alpha, 16)"
                )
            a, b = tensors[f"{base}.lora.A"].read(), tensors[f"{base}.lora.B"].read()
            tensor = LazyTensor.of(tensor.read() + scale * (a @ b).T)
        merged[f"{base}.{kind}"] = tensor
    return merged


def _read_linear(
    path: Path, tensors: dict[str, LazyTensor], arguments: Any, n_heads: int | None
) -> Checkpoint:
    nano = isinstance(arguments, Mapping)  # nanoGPT says its shape, and its GELU is exact
    rest: dict[str, Any] = {}
    if nano:
        n_heads, rest["drop_rate"] = arguments.get("n_head"), arguments.get("dropout", 0.0)
    config = _config(
        path,
        tensors,
        ("wte.weight", "wpe.weight"),
        n_heads=n_heads,
        n_layers=_layers(tensors, r"h\.(\d+)\."),
        qkv_bias="h.0.attn.c_attn.bias" in tensors,
        exact_gelu=nano,
        **rest,
    )
    if "ln_f.bias" not in tensors:  # nanoGPT's bias=False: no bias anywhere
        for rule in LINEAR_RULES:
            for _, (name,) in rule.names(config):
                if name.endswith("bias") and not name.endswith("c_attn.bias"):
                    size = tensors[f"{name.removesuffix('bias')}weight"].shape[0]
                    tensors[name] = LazyTensor.of(torch.zeros(size))
    head = tensors.get("lm_head.weight")
    if head is None or torch.equal(head.read(), tensors["wte.weight"].read()):
        config = replace(config, tie_weights=True)
    renamed = adopt(LINEAR_RULES, tensors, config, path, ignore=_LINEAR_MASKS)
    return Checkpoint(path, "nanoGPT" if nano else "minGPT", config, renamed)
