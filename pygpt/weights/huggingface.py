"""Hugging Face's GPT-2: config.json beside model.safetensors, or beside shards with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.tokenizer import EOT, Tokenizer
from pygpt.weights.files import read_json, read_safetensors, write_json, write_safetensors
from pygpt.weights.layout import Checkpoint, Table, adopt, blaming, export

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEAD, LABELS = "head.safetensors", "labels.json"  # of a classifier

TABLE = Table(
    "tok_emb=wte pos_emb=wpe blocks=h norm1=ln_1 att.qkv=attn.c_attn att.out=attn.c_proj "
    "norm2=ln_2 ff.up=mlp.c_fc ff.down=mlp.c_proj final_norm=ln_f out_head=lm_head "
    "transformer.lm_head=lm_head",  # which alone has no prefix when it is written
    ignore=r"h\.\d+\.attn\.(bias|masked_bias)",  # buffers that old versions saved
    transposed=True,  # Conv1D's
)

# Our keys of a configuration and theirs, and what theirs are where config.json is silent.
_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
    "drop_rate": "resid_pdrop",
    "tie_weights": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_DEFAULTS = {"resid_pdrop": 0.1, "tie_word_embeddings": True, "initializer_range": 0.02}


def read(folder: Path, weights: Path | None = None) -> Checkpoint:
    """The model in `folder`, or in the safetensors file `weights` beside its config.json."""
    files = [weights or folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = [folder / shard for shard in shards_of(folder / INDEX)]
    source, checks = read_safetensors(*files)
    classifies = (folder / LABELS).is_file() and (folder / HEAD).is_file()
    head, more = read_safetensors(*[folder / HEAD] if classifies else [])
    checkpoint = adopt_beside(source, weights or folder, "Hugging Face")
    checkpoint = replace(checkpoint, checks=[*checks, *more])
    return checkpoint.classifying(head) if classifies else checkpoint


def shards_of(index: Path) -> list[str]:
    """The files beside an index that hold the tensors; a name that leads elsewhere is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: weight_map is missing or empty")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
            raise DataError(f"{index}: {shard!r} is not the name of a file beside it")
    return sorted(set(weight_map.values()))


def adopt_beside(source: Mapping[str, Tensor], path: Path, format: str) -> Checkpoint:
    """The model whose tensors `source` came from `path`, by the config.json in or beside that."""
    beside = (path if path.is_dir() else path.parent) / CONFIG
    raw = read_json(beside)
    config = config_from_json(raw, beside)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in source.items()}
    if len(tensors) < len(source):
        raise DataError(f"{path}: a tensor is there twice, with and without `transformer.`")
    return replace(adopt(TABLE, tensors, config, path, format), eos_id=raw.get("eos_token_id"))


def config_from_json(raw: Mapping[str, Any], path: Path) -> GPTConfig:
    """The shape that a config.json of transformers describes; refuses what is not GPT-2."""
    if raw.get("model_type", "gpt2") != "gpt2":
        raise DataError(f"{path}: model_type is {raw['model_type']!r}, pygpt reads 'gpt2'")
    raw = {**_DEFAULTS, "n_positions": raw.get("n_ctx"), **raw}
    with blaming(path):
        config = GPTConfig(
            **{ours: raw[theirs] for ours, theirs in _KEYS.items()},
            qkv_bias=raw.get("pygpt", {}).get("qkv_bias", True),
            exact_gelu=raw.get("activation_function") == "gelu",
        )
    demands = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.emb_dim),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, allowed in demands.items():
        if raw.get(key, allowed[0]) not in allowed:
            known = " or ".join(map(repr, allowed))
            raise DataError(f"{path}: {key} is {raw[key]!r}, pygpt's GPT has {known}")
    return config


def write(
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model.safetensors, config.json and what else there is; each whole or not at all.

    Under "pygpt" config.json holds what transformers has no key for.
    """
    config, eos_id = checkpoint.config, checkpoint.eos_id
    tensors = export(replace(TABLE, prefix="transformer."), checkpoint)
    stored = dtype or tensors["transformer.wte.weight"].dtype
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        eos_id = _write_tokenizer(folder, tokenizer, config.context_length)
    write_safetensors(folder / WEIGHTS, tensors, dtype)
    raw = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "activation_function": "gelu" if config.exact_gelu else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(stored).removeprefix("torch."),
        "pygpt": {"qkv_bias": config.qkv_bias},
    }
    write_json(folder / CONFIG, raw)
    (folder / INDEX).unlink(missing_ok=True)  # of sharded weights that were here before
    if checkpoint.classifier is not None:
        write_safetensors(folder / HEAD, checkpoint.classifier)
        labels = [str(n) for n in range(len(checkpoint.classifier["bias"]))]
        write_json(folder / LABELS, labels)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> int | None:
    """Write what AutoTokenizer needs; returns the id of the end of a text."""
    tokenizer.save(folder / "tokenizer.json")
    end = EOT if EOT in tokenizer.special_tokens_set else None
    raw = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", raw)
    return tokenizer.eot_token if end else None
