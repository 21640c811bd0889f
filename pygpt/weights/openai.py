"""OpenAI's GPT-2 checkpoints: hparams.json beside TensorFlow's model.ckpt.*."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pygpt.errors import DataError
from pygpt.weights import huggingface
from pygpt.weights.files import read_json
from pygpt.weights.layout import Checkpoint, Table, adopt
from pygpt.weights.tensorflow_bundle import read_bundle

# Hugging Face kept their names, but for these.
TABLE = Table(
    "tok_emb.weight=tok_emb pos_emb.weight=pos_emb norm1.weight=norm1.g norm2.weight=norm2.g "
    f"final_norm.weight=final_norm.g weight=w bias=b blocks.=h {huggingface.TABLE.renames} .=/",
    prefix="model/",
    ignore=".*(Adam|global_step|_power).*",
    transposed=True,
)


def read(folder: Path) -> Checkpoint:
    """The model in a folder of OpenAI's."""
    hparams = folder / "hparams.json"
    raw = read_json(hparams)
    config = huggingface.config_from_json({"vocab_size": raw.get("n_vocab"), **raw}, hparams)
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise DataError(f"{folder} has {len(indices)} checkpoints (*.index), expected one")
    source, checks = read_bundle(indices[0])
    # Their matrices are kernels of a convolution of width 1: (1, in, out).
    source = {name: t.squeeze(0) if t.dim() == 3 else t for name, t in source.items()}
    return replace(adopt(TABLE, source, config, folder, "OpenAI (TensorFlow)"), checks=checks)
