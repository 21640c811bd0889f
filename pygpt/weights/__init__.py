"""Models in and out of every format, as a configuration and a stream of named tensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError, UsageError
from pygpt.tokenizer import EOT, Tokenizer
from pygpt.weights import gguf, hub, huggingface, llmc, openai, pickled
from pygpt.weights.files import read_json, refuse_stand_ins, write_safetensors, write_whole
from pygpt.weights.layout import Checkpoint, LazyTensor

TOKENIZERS = ("tokenizer.json", "vocab.json", "encoder.json")  # one of these is in a folder
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def load(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """The model in a folder or safetensors file, or of a name on the Hugging Face hub.

    A folder that holds a `model` folder (a training run) gives that. Nothing but names and shapes
    is read until `Checkpoint.load`. Pickled files are left to `convert`. Raises FileNotFoundError
    or DataError, naming the file.
    """
    path = Path(source)
    if not path.exists():
        path = hub.download(str(source), revision)
    if path.is_dir():
        inner = path / "model"
        if (inner / huggingface.CONFIG).is_file():
            path = inner
        if (path / huggingface.CONFIG).is_file():
            return huggingface.read(path)
        if (path / "hparams.json").is_file():
            return openai.read(path)
        raise FileNotFoundError(
            f"{path} holds no model: neither config.json (Hugging Face) nor hparams.json (OpenAI)"
        )
    if path.suffix == ".safetensors":
        return huggingface.read(path.parent, path)
    refuse_stand_ins(path)
    with path.open("rb") as file:
        head = file.read(4)
    if head == llmc.MAGIC.to_bytes(4, "little"):
        return llmc.read(path)
    if head == b"GGUF":
        raise DataError(f"{path} is a GGUF file, which pygpt writes but does not read")
    if _is_pickled(path):
        raise DataError(f"{path} is a pickled file; bring it in with `pygpt convert {path} FOLDER`")
    raise DataError(f"{path} is no checkpoint of a format that pygpt knows")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    n_heads: int | None = None,
    lora_scale: float | None = None,
    revision: str | None = None,
) -> str:
    """Read a checkpoint of any format and write it as a model folder, or as GGUF; says what it did.

    The format of `source` is told by its content; `target` is GGUF where its name ends so. `dtype`
    is f32, f16 or bf16, and for GGUF also q8_0; by default the folder keeps what the file holds and
    GGUF is f32. `n_heads` and `lora_scale` say what a bare state dict does not (see `pickled`).
    """
    checkpoint, target = _load_any(source, revision, n_heads, lora_scale), Path(target)
    to_gguf = target.suffix == ".gguf"
    known = gguf.TYPES if to_gguf else _DTYPES
    if dtype is not None and dtype not in known:
        raise UsageError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    if target.is_file() and not to_gguf:
        raise UsageError(f"{target} is a file; give a folder, or a name that ends in .gguf")
    if to_gguf and checkpoint.classifier is not None:
        raise UsageError(f"{source} classifies, which llama.cpp's gpt2 cannot; write a folder")
    folder, tensors, kind = checkpoint.folder, checkpoint.tensors, dtype or "f32"
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _tokenizer_beside(folder, Path(scratch), checkpoint.config)
        if to_gguf:
            gguf.write(target, checkpoint, kind, tokenizer)
        else:
            if dtype is not None:
                tensors = {name: t.cast(_DTYPES[dtype]) for name, t in tensors.items()}
            kind = _dtype_names(tensors)
            beside = folder / huggingface.CONFIG
            eos_id = read_json(beside).get("eos_token_id") if beside.is_file() else None
            huggingface.write(target, checkpoint.config, tensors, eos_id=eos_id)
            if checkpoint.classifier is not None:
                write_safetensors(target / "head.safetensors", checkpoint.classifier)
                labels = [str(n) for n in range(checkpoint.classifier["bias"].numel)]
                write_whole(target / "labels.json", [json.dumps(labels).encode()])
            for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
                found = tokenizer.with_name(name)  # type: ignore[union-attr]
                if found.is_file() and found.resolve() != (target / name).resolve():
                    shutil.copyfile(found, target / name)
    count = sum(tensor.numel for tensor in tensors.values())
    return (
        f"read {checkpoint.path} ({checkpoint.format}, {count:,} parameters), wrote {target} "
        f"({'GGUF' if to_gguf else 'Hugging Face'}, {kind}, "
        f"{'with its' if tokenizer else 'without a'} tokenizer)"
    )


def _tokenizer_beside(folder: Path, scratch: Path, config: GPTConfig) -> Path | None:
    """A folder's tokenizer.json; made in `scratch` where there is only the vocabulary it needs."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    _save_tokenizer(scratch, Tokenizer.from_file(folder), config)
    return scratch / "tokenizer.json"


def _dtype_names(tensors: Mapping[str, LazyTensor]) -> str:
    names = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return " and ".join(names)


def describe(
    source: str | os.PathLike[str],
    *,
    n_heads: int | None = None,
    lora_scale: float | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds and needs: format, configuration, parameters, dtype, bytes.

    Inference is the weights and the cache of one sequence of full length; training is weights,
    gradients and AdamW's two moments in float32, without activations.
    """
    checkpoint = _load_any(source, revision, n_heads, lora_scale)
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    count, size = sum(t.numel for t in tensors), sum(t.numel * t.dtype.itemsize for t in tensors)
    cache = 2 * config.n_layers * config.context_length * config.emb_dim
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": "gpt2",
        **config.to_dict(),
        "parameters": count,
        "dtype": _dtype_names(checkpoint.tensors),
        "tokenizer": any((checkpoint.folder / name).is_file() for name in TOKENIZERS),
        "weight_bytes": size,
        "inference_bytes": size + cache * max(t.dtype.itemsize for t in tensors),
        "training_bytes": 16 * count,
    }


def _load_any(
    source: str | os.PathLike[str],
    revision: str | None,
    n_heads: int | None,
    lora_scale: float | None,
) -> Checkpoint:
    path = Path(source)
    only_pickled = path / "pytorch_model.bin"
    if only_pickled.is_file() and not any(path.glob("model*.safetensors")):
        path = only_pickled
    if path.is_file() and _is_pickled(path):
        return pickled.read(path, n_heads=n_heads, lora_scale=lora_scale)
    return load(source, revision=revision)


def _is_pickled(path: Path) -> bool:
    """Whether a file is a zip archive or bare pickle, as torch.save writes them."""
    with path.open("rb") as file:
        head = file.read(4)
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x04"))


def save(
    folder: str | os.PathLike[str],
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model (and its tokenizer) as a folder that transformers opens too."""
    folder = Path(folder)
    lazy = {name: LazyTensor.of(tensor.detach()) for name, tensor in tensors.items()}
    eos_id = None
    if tokenizer is not None:
        if tokenizer.n_vocab > config.vocab_size:
            raise UsageError(
                f"the tokenizer's {tokenizer.n_vocab} words do not fit the model's "
                f"{config.vocab_size}"
            )
        eos_id = _save_tokenizer(folder, tokenizer, config)
    huggingface.write(folder, config, lazy, eos_id=eos_id)


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, config: GPTConfig) -> int | None:
    """Write what AutoTokenizer needs; returns the id of the end of a text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    has_end = EOT in tokenizer.special_tokens_set
    huggingface.write_tokenizer_config(folder, EOT if has_end else None, config.context_length)
    return tokenizer.eot_token if has_end else None
