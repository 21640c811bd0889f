"""PyTorch's pickled files, read with `weights_only` and only by `convert`.

They hold the book's state dicts (plain, or with its LoRA), nanoGPT's ckpt.pt, minGPT's model.pt, or
pytorch_model.bin of transformers; which one, its names and shapes tell.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
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
from pygpt.weights.layout import Checkpoint, LazyTensor, Table, adopt, blaming, shapes

BOOK = Table(
    "tok_emb pos_emb trf_blocks.*.norm1 "
    "trf_blocks.*.att.W_query|trf_blocks.*.att.W_key|trf_blocks.*.att.W_value "
    "trf_blocks.*.att.out_proj trf_blocks.*.norm2 trf_blocks.*.ff.layers.0 "
    "trf_blocks.*.ff.layers.2 final_norm out_head",
    norm=(".scale", ".shift"),
)
_BOOK_MASKS = r"trf_blocks\.\d+\.att\.mask"

# nanoGPT and minGPT call everything as Hugging Face does, in nn.Linear's orientation.
LINEAR = replace(huggingface.TABLE, transposed=False)
_LINEAR_MASKS = r"h\.\d+\.attn\.bias"

# What zipfile and torch.load raise for files that are cut or altered.
_DAMAGE = (
    *(RuntimeError, EOFError, OSError, LookupError, ValueError, AttributeError, struct.error),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error),
)


def read(path: Path, *, n_heads: int | None, lora_scale: float | None) -> Checkpoint:
    """The model in a pickled file.

    State dicts do not tell the number of heads: it is known for the sizes of GPT-2 and must be
    given for others. `lora_scale` is what the book's x A B is multiplied by, its alpha.
    """
    raw = _unpickle(path)
    found = [raw[key] for key in ("model_state_dict", "model", "state_dict") if key in raw]
    state = found[0] if found and isinstance(found[0], Mapping) else raw
    tensors = {
        re.sub(r"^(_orig_mod\.|module\.|transformer\.)*", "", name): LazyTensor.of(tensor)
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if any(name.startswith("trf_blocks.") for name in tensors):
        return _read_book(path, _merge_lora(tensors, lora_scale), n_heads)
    attention = tensors.get("h.0.attn.c_attn.weight")
    if attention is None or len(attention.shape) != 2:
        raise DataError(
            f"{path} holds neither a state dict of the book, nor of nanoGPT, minGPT or "
            f"transformers' GPT-2; its first names are {', '.join([*tensors][:4]) or 'none'}"
        )
    if attention.shape[0] < attention.shape[1]:  # Conv1D: (C, 3 C)
        beside = path.parent / huggingface.CONFIG
        config = huggingface.config_from_json(read_json(beside), beside)
        return huggingface.adopt_tensors(tensors, config, path, "PyTorch file of transformers")
    return _read_linear(path, tensors, raw.get("model_args"), n_heads)


def _unpickle(path: Path) -> Mapping[str, Any]:
    refuse_stand_ins(path)
    mappable = zipfile.is_zipfile(path)  # not so before PyTorch 1.6
    try:
        if mappable and (damaged := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors, or is damaged, and was not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except _DAMAGE as error:
        raise DataError(f"{path} is not a whole PyTorch file: {error}") from error
    if not isinstance(raw, Mapping):
        raise DataError(f"{path} holds a {type(raw).__name__}, expected a state dict")
    return raw


def _config(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    names: tuple[str, str, str],
    n_heads: int | None,
    **rest: Any,
) -> GPTConfig:
    """A configuration whose sizes are those of the two embeddings, and how many blocks there are.

    The third of `names` is a pattern for names in a block.
    """
    sizes = [tensors[name].shape for name in names[:2] if name in tensors]
    if [len(shape) for shape in sizes] != [2, 2]:
        raise DataError(f"{path}: {' or '.join(names[:2])} is missing, or is no matrix")
    (vocab_size, emb_dim), (context_length, _) = sizes
    known = {size["emb_dim"]: size["n_heads"] for size in GPT2_SIZES.values()}
    if n_heads is None and emb_dim not in known:
        raise UsageError(f"{path} does not tell its number of attention heads; give n_heads")
    blocks = [int(found[1]) for name in tensors if (found := re.match(names[2], name))]
    with blaming(path):
        return GPTConfig(
            vocab_size,
            context_length,
            emb_dim,
            n_heads or known[emb_dim],
            1 + max(blocks, default=-1),
            **rest,
        )


def _read_book(path: Path, tensors: Mapping[str, LazyTensor], n_heads: int | None) -> Checkpoint:
    classifier = None
    if "out_head.bias" in tensors and "out_head.weight" in tensors:  # classes in place of words
        classifier = {name: tensors[f"out_head.{name}"] for name in ("weight", "bias")}
        tensors = {n: t for n, t in tensors.items() if not n.startswith("out_head.")}
    config = _config(
        path,
        tensors,
        ("tok_emb.weight", "pos_emb.weight", r"trf_blocks\.(\d+)\."),
        n_heads,
        qkv_bias="trf_blocks.0.att.W_query.bias" in tensors,
        tie_weights=classifier is not None,
    )
    renamed = adopt(BOOK, tensors, config, path, ignore=_BOOK_MASKS)
    return Checkpoint(path, "state dict of the book", config, renamed, classifier)


def _merge_lora(tensors: Mapping[str, LazyTensor], scale: float | None) -> Mapping[str, LazyTensor]:
    """Fold `linear.weight + scale (A B)^T` of the book's LinearWithLoRA into one weight."""
    merged = {}
    for name, tensor in tensors.items():
        base, inner, kind = name.rpartition(".linear.")
        if kind == "weight" and f"{base}.lora.A" in tensors:
            if scale is None:
                raise UsageError(
                    f"the state dict has LoRA matrices ({base}.lora.A) but not their scale; "
                    f"give lora_scale (the book's alpha, 16)"
                )
            a, b = tensors[f"{base}.lora.A"].read(), tensors[f"{base}.lora.B"].read()
            tensor = LazyTensor.of(tensor.read() + scale * (a @ b).T)
        if ".lora." not in name:
            merged[f"{base}.{kind}" if inner else name] = tensor
    return merged


def _read_linear(
    path: Path, tensors: dict[str, LazyTensor], arguments: Any, n_heads: int | None
) -> Checkpoint:
    nano = isinstance(arguments, Mapping)  # nanoGPT says its shape, and its GELU is exact
    config = _config(
        path,
        tensors,
        ("wte.weight", "wpe.weight", r"h\.(\d+)\."),
        arguments.get("n_head") if nano else n_heads,
        drop_rate=arguments.get("dropout", 0.0) if nano else GPTConfig.drop_rate,
        qkv_bias="h.0.attn.c_attn.bias" in tensors,
        exact_gelu=nano,
    )
    if "ln_f.bias" not in tensors:  # nanoGPT's bias=False: no bias anywhere
        wanted = shapes(config)
        for ours, (theirs,), _ in LINEAR.names(config.n_layers):
            if theirs.endswith("bias") and ours in wanted:
                tensors.setdefault(theirs, LazyTensor.of(torch.zeros(wanted[ours])))
    head, embedding = tensors.get("lm_head.weight"), tensors["wte.weight"].read()
    if head is None or torch.equal(head.read(), embedding):
        config = replace(config, tie_weights=True)
    renamed = adopt(LINEAR, tensors, config, path, ignore=_LINEAR_MASKS)
    return Checkpoint(path, "nanoGPT" if nano else "minGPT", config, renamed)
