"""Models in and out of every format, as a configuration and a stream of named tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError, UsageError
from pygpt.tokenizer import Tokenizer
from pygpt.tokenizer.formats import holds_vocabulary
from pygpt.weights import gguf, hub, huggingface, llmc, openai, pickled
from pygpt.weights.files import read_bytes, refuse_stand_ins, write_bytes
from pygpt.weights.layout import DTYPES, Checkpoint

# What lies beside a model's weights and goes along with them as it is.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "labels.json", "template.json")


def load(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """The model in a folder or safetensors file, or of a name on the Hugging Face hub.

    A folder that holds a `model` folder (a training run) gives that. Nothing but names and shapes
    is read until `Checkpoint.load`. Pickled files are left to `read`. Raises FileNotFoundError or
    DataError, naming the file.
    """
    path = Path(source)
    if not path.exists():
        path = hub.download(str(source), revision)
    if path.is_dir():
        for folder in (path / "model", path):
            if (folder / huggingface.CONFIG).is_file():
                return huggingface.read(folder)
        if (path / "hparams.json").is_file():
            return openai.read(path)
        raise FileNotFoundError(
            f"{path} holds no model: neither config.json (Hugging Face) nor hparams.json (OpenAI)"
        )
    head = refuse_stand_ins(path)
    if path.suffix == ".safetensors":
        return huggingface.read(path.parent, path)
    if head.startswith(llmc.MAGIC):
        return llmc.read(path)
    if head.startswith(b"GGUF"):
        raise DataError(f"{path} is a GGUF file, which pygpt writes but does not read")
    if pickled.recognises(head):
        raise DataError(f"{path} is a pickled file; bring it in with `pygpt convert {path} FOLDER`")
    raise DataError(f"{path} is no checkpoint of a format that pygpt knows")


def read(
    source: str | os.PathLike[str], *, n_heads: int | None = None, lora_scale: float | None = None
) -> Checkpoint:
    """As `load`, and pickled files too; the arguments say what those do not (see `pickled`)."""
    path = Path(source)
    only_pickled = path / "pytorch_model.bin"
    if only_pickled.is_file() and not any(path.glob("model*.safetensors")):
        path = only_pickled
    if path.is_file() and pickled.recognises(refuse_stand_ins(path)):
        return pickled.read(path, n_heads=n_heads, lora_scale=lora_scale)
    return load(source)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    n_heads: int | None = None,
    lora_scale: float | None = None,
) -> str:
    """Read a checkpoint of any format and write it as a model folder, or as GGUF; says what it did.

    The format of `source` is told by its content; `target` is GGUF where its name ends so. `dtype`
    is f32, f16, bf16 or f64, for GGUF q8_0 in place of the last; by default the folder keeps what
    the file holds and GGUF is f32.
    """
    checkpoint, target = read(source, n_heads=n_heads, lora_scale=lora_scale), Path(target)
    config, folder, to_gguf = checkpoint.config, checkpoint.folder, target.suffix == ".gguf"
    known = gguf.TYPES if to_gguf else DTYPES
    if dtype is not None and dtype not in known:
        raise UsageError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    if target.is_file() and not to_gguf:
        raise UsageError(f"{target} is a file; give a folder, or a name that ends in .gguf")
    kind = dtype or ("f32" if to_gguf else _dtypes(checkpoint))
    beside = {name: read_bytes(folder / name) for name in _BESIDE if (folder / name).is_file()}
    has_tokenizer, tokenizer = holds_vocabulary(folder), None
    if has_tokenizer and (to_gguf or "tokenizer.json" not in beside):
        tokenizer = _fitting(Tokenizer.from_file(folder), config)
    if to_gguf:
        gguf.write(target, checkpoint, kind, tokenizer)
    else:
        huggingface.write(target, checkpoint, tokenizer, DTYPES.get(dtype or ""))
        for name, content in beside.items():
            write_bytes(target / name, content)
    count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    return (
        f"read {checkpoint.path} ({checkpoint.format}, {count:,} parameters), wrote {target} "
        f"({'GGUF' if to_gguf else 'Hugging Face'}, {kind}, "
        f"{'with its' if has_tokenizer else 'without a'} tokenizer)"
    )


def save(
    folder: str | os.PathLike[str],
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model (and its tokenizer) as a folder that transformers opens too."""
    checkpoint = Checkpoint(Path(folder), "Hugging Face", config, tensors)
    huggingface.write(Path(folder), checkpoint, _fitting(tokenizer, config))


def _fitting(tokenizer: Tokenizer | None, config: GPTConfig) -> Tokenizer | None:
    if tokenizer is not None and tokenizer.n_vocab > config.vocab_size:
        raise UsageError(
            f"the tokenizer's {tokenizer.n_vocab} words do not fit the model's {config.vocab_size}"
        )
    return tokenizer


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds and needs: format, configuration, parameters, dtype, bytes.

    Inference is the weights and the cache of one sequence of full length; training is weights,
    gradients and AdamW's two moments in float32, without activations.
    """
    config, tensors = checkpoint.config, checkpoint.tensors.values()
    count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    cache = 2 * config.n_layers * config.context_length * config.emb_dim
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architecture": "gpt2",
        **config.to_dict(),
        "parameters": count,
        "dtype": _dtypes(checkpoint),
        "tokenizer": holds_vocabulary(checkpoint.folder),
        "weight_bytes": size,
        "inference_bytes": size + cache * max(t.dtype.itemsize for t in tensors),
        "training_bytes": 16 * count,
    }


def _dtypes(checkpoint: Checkpoint) -> str:
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}
    return " and ".join(sorted(names))
