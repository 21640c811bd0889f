"""Hugging Face's GPT-2: config.json beside model.safetensors, or beside shards with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.weights.files import read_json, read_safetensors, write_safetensors, write_whole
from pygpt.weights.layout import Checkpoint, LazyTensor, Table, adopt, blaming, export

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

TABLE = Table(
    "wte wpe h.*.ln_1 h.*.attn.c_attn h.*.attn.c_proj h.*.ln_2 h.*.mlp.c_fc h.*.mlp.c_proj "
    "ln_f lm_head",
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
_MASKS = r"h\.\d+\.attn\.(bias|masked_bias)"  # buffers that old versions of transformers saved


def read(folder: Path, weights: Path | None = None) -> Checkpoint:
    """The model in `folder`, or in the safetensors file `weights` beside its config.json."""
    raw = read_json(folder / CONFIG)
    config = config_from_json(raw, folder / CONFIG)
    source = {
        name.removeprefix("transformer."): tensor
        for name, tensor in read_tensors(folder, weights).items()
    }
    return adopt_tensors(source, config, weights or folder, "Hugging Face")


def adopt_tensors(
    source: Mapping[str, LazyTensor], config: GPTConfig, path: Path, format: str
) -> Checkpoint:
    """Settle from the tensors what the configuration leaves open, then rename them."""
    head, embedding = source.get("lm_head.weight"), source.get("wte.weight")
    changes: dict[str, Any] = {}
    if config.tie_weights and head is not None and embedding is not None:
        changes["tie_weights"] = torch.equal(head.read(), embedding.read())
    biases = [tensor for name, tensor in source.items() if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias:  # saved as zeros, and trained elsewhere since when they are not
        changes["qkv_bias"] = any(bool(bias.read().any()) for bias in biases)
    config = GPTConfig.from_dict({**config.to_dict(), **changes})
    return Checkpoint(path, format, config, adopt(TABLE, source, config, path, ignore=_MASKS))


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


def config_to_json(config: GPTConfig, dtype: torch.dtype, eos_id: int | None) -> dict[str, Any]:
    """What transformers needs to open the folder, and under "pygpt" what it has no key for."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
        "activation_function": "gelu" if config.exact_gelu else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.drop_rate,
        "attn_pdrop": config.drop_rate,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pygpt": {"qkv_bias": config.qkv_bias},
    }


def write(
    folder: Path,
    config: GPTConfig,
    tensors: Mapping[str, LazyTensor],
    *,
    eos_id: int | None = None,
) -> None:
    """Write config.json and model.safetensors; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = export(TABLE, tensors, config.n_layers)
    if not config.qkv_bias:  # transformers' GPT-2 always has them
        zeros = torch.zeros(3 * config.emb_dim, dtype=tensors["tok_emb.weight"].dtype)
        for n in range(config.n_layers):
            theirs[f"h.{n}.attn.c_attn.bias"] = LazyTensor.of(zeros)
    named = {n if n == "lm_head.weight" else f"transformer.{n}": t for n, t in theirs.items()}
    write_safetensors(folder / WEIGHTS, named)
    raw = config_to_json(config, tensors["tok_emb.weight"].dtype, eos_id)
    write_whole(folder / CONFIG, [json.dumps(raw, indent=2).encode() + b"\n"])
    (folder / INDEX).unlink(missing_ok=True)  # of sharded weights that were here before


def read_tensors(folder: Path, weights: Path | None = None) -> dict[str, LazyTensor]:
    """Every tensor of a safetensors file or of the shards that an index lists."""
    if weights is None and not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        return _read_shards(folder)
    return read_safetensors(weights or folder / WEIGHTS)


def _read_shards(folder: Path) -> dict[str, LazyTensor]:
    weight_map = shards_of(folder / INDEX)
    shards = {shard: read_safetensors(folder / shard) for shard in set(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise DataError(f"{folder / shard}: {name} is missing, which {INDEX} says is there")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def shards_of(index: Path) -> dict[str, str]:
    """Which file beside an index holds each tensor; a name that leads elsewhere is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: weight_map is missing or empty")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*", shard):
            raise DataError(f"{index}: {shard!r} is not the name of a file beside it")
    return weight_map


def write_tokenizer_config(folder: Path, eos: str | None, context_length: int) -> None:
    """What AutoTokenizer needs beside tokenizer.json."""
    raw = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_whole(folder / "tokenizer_config.json", [json.dumps(raw, indent=2).encode() + b"\n"])
