"""A classifier's head and its labels, in two files beside the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pygpt.errors import DataError
from pygpt.weights.files import read_json, read_safetensors, write_safetensors, write_whole
from pygpt.weights.layout import LazyTensor

HEAD, LABELS = "head.safetensors", "labels.json"


def write(folder: Path, head: Mapping[str, LazyTensor], labels: Sequence[str]) -> None:
    """Write the weight (labels, C) and bias (labels) of a linear layer, and what it tells apart."""
    write_safetensors(folder / HEAD, head)
    write_whole(folder / LABELS, [json.dumps(list(labels)).encode() + b"\n"])


def read(folder: Path, emb_dim: int) -> tuple[dict[str, Tensor], list[str]]:
    """The head in `folder` and its labels; DataError names the file that does not fit."""
    labels = read_json(folder / LABELS, list)
    if not labels or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{folder / LABELS} must hold a list of texts")
    head = read_safetensors(folder / HEAD)
    found = {name: tensor.shape for name, tensor in head.items()}
    expected = {"weight": (len(labels), emb_dim), "bias": (len(labels),)}
    if found != expected:
        raise DataError(f"{folder / HEAD} holds {found}, expected {expected} for {LABELS}")
    return {name: tensor.read() for name, tensor in head.items()}, labels
