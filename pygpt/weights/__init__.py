"""Models in and out of every format, as a configuration and a stream of named tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.weights import hub, huggingface
from pygpt.weights.files import refuse_stand_ins
from pygpt.weights.layout import Checkpoint, LazyTensor

END_OF_TEXT = "<|endoftext|>"


def load(source: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """The model in a folder or safetensors file, or of a name on the Hugging Face hub.

    A folder that holds a `model` folder (a training run) gives that. Nothing but names and shapes
    is read until `Checkpoint.load`. Raises FileNotFoundError or DataError, naming the file.
    """
    path = Path(source)
    if not path.exists():
        path = hub.download(str(source), revision)
    if path.is_dir():
        inner = path / "model"
        return huggingface.read(inner if (inner / huggingface.CONFIG).is_file() else path)
    if path.suffix == ".safetensors":
        return huggingface.read(path.parent, path)
    refuse_stand_ins(path)
    raise DataError(f"{path} is not a model folder or a safetensors file")


def save(
    folder: str | os.PathLike[str],
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Any = None,
) -> None:
    """Write a model (and its tokenizer) as a folder that transformers opens too."""
    folder = Path(folder)
    lazy = {name: LazyTensor.of(tensor.detach()) for name, tensor in tensors.items()}
    eos_id = None
    if tokenizer is not None and END_OF_TEXT in tokenizer.special_tokens_set:
        eos_id = tokenizer.encode_single_token(END_OF_TEXT)
    huggingface.write(folder, config, lazy, eos_id=eos_id)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        eos = END_OF_TEXT if eos_id is not None else None
        huggingface.write_tokenizer_config(folder, eos, config.context_length)
