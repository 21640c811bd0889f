"""OpenAI's GPT-2 checkpoints: hparams.json beside TensorFlow's model.ckpt.*."""

from __future__ import annotations

from pathlib import Path

from pygpt.errors import DataError
from pygpt.weights.files import read_json
from pygpt.weights.huggingface import config_from_json
from pygpt.weights.layout import Checkpoint, LazyTensor, Table, adopt
from pygpt.weights.tensorflow_bundle import read_bundle

TABLE = Table(
    "model/wte model/wpe model/h*/ln_1 model/h*/attn/c_attn model/h*/attn/c_proj model/h*/ln_2 "
    "model/h*/mlp/c_fc model/h*/mlp/c_proj model/ln_f (tied)",
    norm=("/g", "/b"),
    linear=("/w", "/b"),
    embedding=("",),
    transposed=True,
)


def read(folder: Path) -> Checkpoint:
    """The model in a folder of OpenAI's."""
    hparams = folder / "hparams.json"
    raw = read_json(hparams)
    config = config_from_json({"vocab_size": raw.get("n_vocab"), **raw}, hparams)
    indices = sorted(folder.glob("*.index"))
    if len(indices) != 1:
        raise DataError(f"{folder} has {len(indices)} checkpoints (*.index), expected one")
    source = {name: _matrix(tensor) for name, tensor in read_bundle(indices[0]).items()}
    tensors = adopt(TABLE, source, config, indices[0], ignore=".*(Adam|global_step|_power).*")
    return Checkpoint(folder, "OpenAI (TensorFlow)", config, tensors)


def _matrix(tensor: LazyTensor) -> LazyTensor:
    """Their matrices are kernels of a convolution of width 1: (1, in, out)."""
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        return tensor
    return LazyTensor(tensor.shape[1:], tensor.dtype, lambda: tensor.read()[0])
