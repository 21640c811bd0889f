"""OpenAI's GPT-2 checkpoints: hparams.json beside TensorFlow's model.ckpt.*."""

from __future__ import annotations

from pathlib import Path

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.weights.files import read_json
from pygpt.weights.layout import Checkpoint, LazyTensor, Rule, adopt
from pygpt.weights.tensorflow_bundle import read_bundle

RULES = (
    Rule("tok_emb.weight", "model/wte"),
    Rule("pos_emb.weight", "model/wpe"),
    Rule("blocks.*.norm1.weight", "model/h*/ln_1/g"),
    Rule("blocks.*.norm1.bias", "model/h*/ln_1/b"),
    Rule("blocks.*.att.qkv.weight", "model/h*/attn/c_attn/w", transposed=True),
    Rule("blocks.*.att.qkv.bias", "model/h*/attn/c_attn/b"),
    Rule("blocks.*.att.out.weight", "model/h*/attn/c_proj/w", transposed=True),
    Rule("blocks.*.att.out.bias", "model/h*/attn/c_proj/b"),
    Rule("blocks.*.norm2.weight", "model/h*/ln_2/g"),
    Rule("blocks.*.norm2.bias", "model/h*/ln_2/b"),
    Rule("blocks.*.ff.up.weight", "model/h*/mlp/c_fc/w", transposed=True),
    Rule("blocks.*.ff.up.bias", "model/h*/mlp/c_fc/b"),
    Rule("blocks.*.ff.down.weight", "model/h*/mlp/c_proj/w", transposed=True),
    Rule("blocks.*.ff.down.bias", "model/h*/mlp/c_proj/b"),
    Rule("final_norm.weight", "model/ln_f/g"),
    Rule("final_norm.bias", "model/ln_f/b"),
)


def read(folder: Path) -> Checkpoint:
    """The model in a folder of OpenAI's."""
    raw = read_json(folder / "hparams.json")
    try:
        config = GPTConfig(
            vocab_size=raw["n_vocab"],
            context_length=raw["n_ctx"],
            emb_dim=raw["n_embd"],
            n_heads=raw["n_head"],
            n_layers=raw["n_layer"],
            qkv_bias=True,
            tie_weights=True,
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder / 'hparams.json'}: {error}") from None
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise DataError(f"{folder} has {len(indices)} checkpoints (*.index), expected one")
    source = {
        name: _without_leading_one(tensor) if name.endswith("/w") else tensor
        for name, tensor in read_bundle(indices[0]).items()
    }
    tensors = adopt(RULES, source, config, indices[0], ignore=".*(Adam|global_step|_power).*")
    return Checkpoint(folder, "OpenAI (TensorFlow)", config, tensors)


def _without_leading_one(tensor: LazyTensor) -> LazyTensor:
    """Their matrices are kernels of a convolution of width 1: (1, in, out)."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        return tensor
    return LazyTensor(tensor.shape[1:], tensor.dtype, lambda: tensor.read()[0])
