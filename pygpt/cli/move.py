"""Verbs for checkpoints and vocabularies: convert, info."""

from __future__ import annotations

import json as json_module
import signal
import sys
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from pygpt import Tokenizer, weights
from pygpt.cli.folders import PUBLISHED, load_tokenizer, model_folder
from pygpt.errors import DataError
from pygpt.tokenizer.formats import GPT2_FILES, holds_vocabulary
from pygpt.tokenizer.patterns import native_name


def convert(
    source: Positional[str],
    target: Positional[Path],
    /,
    *,
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
    n_heads: int | None = None,
    lora_scale: float | None = None,
) -> int:
    """Read a checkpoint of any known format and write a model folder or a GGUF file.

    Example: pygpt convert ckpt.pt models/mine

    Args:
        source: A run's or model's folder, a checkpoint of OpenAI, the book, nanoGPT, minGPT or
            llm.c, or a name on the hub; its content tells the format.
        target: The folder to write, or a file that ends in .gguf.
        dtype: Of the weights written; q8_0 for GGUF only. By default what the source has.
        n_heads: Attention heads, where the source does not say.
        lora_scale: alpha / rank of a checkpoint with LoRA, where the source does not say.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes what is half written
    print(weights.convert(source, target, dtype=dtype, n_heads=n_heads, lora_scale=lora_scale))
    return 0


def info(
    source: Positional[str],
    /,
    *,
    n_heads: int | None = None,
    lora_scale: float | None = None,
    json: bool = False,
) -> int:
    """Describe a checkpoint or a vocabulary.

    Example: pygpt info runs/pretrain

    Args:
        source: A run's or model's folder, a checkpoint file, a tokenizer file, or the name of a
            published vocabulary ("cl100k_base") or of a model on the hub.
        n_heads: Attention heads, where a checkpoint does not say.
        lora_scale: alpha / rank of a checkpoint with LoRA, where it does not say.
        json: Print one JSON object.
    """
    if Path(source).name in ("config.json", "hparams.json", "model.safetensors.index.json"):
        source = str(Path(source).parent)  # what these describe
    if _is_vocabulary(source):
        facts = _vocabulary(source)
    else:
        checkpoint = weights.read(_place(source), n_heads=n_heads, lora_scale=lora_scale)
        facts = weights.describe(checkpoint)
    if json:
        print(json_module.dumps(facts))
    else:
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {entry:,}" for key, entry in value.items()) or "none"
            said = f"{value:,}" if type(value) is int else str(value)
            size = f" ({value / 1e6:,.1f} MB)" if name.endswith("_bytes") and value > 1e5 else ""
            print(f"{name.replace('_', ' '):20} {said}{size}")
    return 0


def _is_vocabulary(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return holds_vocabulary(path) and not (path / "config.json").exists()
    if path.suffix in (".tiktoken", ".json") or path.name in GPT2_FILES:
        return path.is_file()
    return source in (*PUBLISHED[1:], "bytes") and not path.exists()


def _vocabulary(source: str) -> dict[str, Any]:
    try:
        tok, bare = load_tokenizer(source), False
    except DataError:
        if not source.endswith(".tiktoken"):
            raise
        tok, bare = Tokenizer.from_file(source, pattern="gpt2", special_tokens={}), True
    special = {token: tok.encode_single_token(token) for token in tok.special_tokens_set}
    ordinary = tok.token_byte_values()
    return {
        "name": tok.name,
        "n_vocab": tok.n_vocab,
        "ordinary_tokens": len(ordinary),
        "special_tokens": dict(sorted(special.items(), key=lambda item: item[1])),
        "pattern": "not in this file" if bare else native_name(tok._pat_str) or tok._pat_str,
        "longest_token_bytes": max(map(len, ordinary)),
    }


def _place(source: str) -> str:
    """A run's model folder; else the source itself, which is a checkpoint or a name."""
    path = Path(source)
    files = ("*.safetensors*", "*.bin*", "hparams.json")
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in files):
        return source
    return str(model_folder(path))
