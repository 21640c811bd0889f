"""What all formats share: a checkpoint of mapped tensors, and tables that rename them.

Our names are those of `pygpt.model.GPT`'s state dict. A format is a `Table`; reading goes through
`adopt`, which checks every name and shape, writing through `export`.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError
from pygpt.ops.native import crc32c

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}

# What a tensor's bytes must sum up to (CRC-32C): file, name, tensor, sum.
Check = tuple[Path, str, Tensor, int]
Names = dict[str, list[str]]  # of one of our tensors: theirs, which stacked by rows are it


@dataclass(frozen=True)
class Checkpoint:
    """A model in a file: its format, configuration and tensors under our names.

    The tensors are mapped, so that nothing is read before it is used. `eos_id` is the end of a text
    where the file says it, `classifier` the weight and bias of a classification head.
    """

    path: Path
    format: str
    config: GPTConfig
    tensors: Mapping[str, Tensor]
    checks: Sequence[Check] = ()
    eos_id: int | None = None
    classifier: Mapping[str, Tensor] | None = None

    @property
    def folder(self) -> Path:
        """Where the configuration and tokenizer lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def classifying(self, head: Mapping[str, Tensor]) -> Checkpoint:
        """The same with a classification head, whose shape is checked."""
        with blaming(self.path):
            if head["weight"].shape != (*head["bias"].shape, self.config.emb_dim):
                raise ValueError("the classification head does not fit the model")
        return replace(self, classifier=head)

    def verified(self) -> Mapping[str, Tensor]:
        """The tensors; DataError names the first that is not what was saved."""
        for path, name, tensor, checksum in self.checks:
            if crc32c(tensor) != checksum:
                raise DataError(f"{path} is damaged: {name} is not what was saved (CRC differs)")
        return self.tensors

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Every tensor, as stored unless `dtype` says otherwise; no copy where it needs no change.

        A transposed float32 matrix stays a view: products with it are as fast, with one or two rows
        up to 1.5 times faster. In 16 bits they are slower, so that those are copied.
        """
        loaded = {}
        for name, stored in self.verified().items():
            as_stored = dtype in (None, stored.dtype) and device in (None, "cpu", stored.device)
            if as_stored and (stored.is_contiguous() or stored.dtype == torch.float32):
                loaded[name] = stored
            else:
                fresh = torch.empty(stored.shape, dtype=dtype or stored.dtype, device=device)
                loaded[name] = fresh.copy_(stored)
        return loaded


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `GPT(config)`, in the order of its state dict."""
    v, t, c = config.vocab_size, config.context_length, config.emb_dim
    weights: dict[str, tuple[int, ...]] = {"tok_emb": (v, c), "pos_emb": (t, c)}
    for n in range(config.n_layers):
        weights |= {
            f"blocks.{n}.norm1": (c,),
            f"blocks.{n}.att.qkv": (3 * c, c),
            f"blocks.{n}.att.out": (c, c),
            f"blocks.{n}.norm2": (c,),
            f"blocks.{n}.ff.up": (4 * c, c),
            f"blocks.{n}.ff.down": (c, 4 * c),
        }
    weights["final_norm"] = (c,)
    if not config.tie_weights:
        weights["out_head"] = (v, c)
    result = {}
    for part, shape in weights.items():
        result[f"{part}.weight"] = shape
        if not part.endswith(("emb", "head")) and (config.qkv_bias or not part.endswith("qkv")):
            result[f"{part}.bias"] = shape[:1]
    return result


@dataclass(frozen=True)
class Table:
    """How a format calls what we call otherwise: `ours=theirs`, replaced in this order.

    A `*` in a name of theirs stands for each of `stacked`.
    `transposed`: the weights of linear layers are stored (in, out). What the pattern `ignore`
    matches whole may be left over.
    """

    renames: str
    prefix: str = ""
    ignore: str = "$^"
    stacked: tuple[str, ...] = ()
    transposed: bool = False

    def names(self, config: GPTConfig) -> Names:
        """Their names for every tensor that a model of this size can have."""
        pairs = [rename.split("=") for rename in self.renames.split()]
        result = {}
        for ours in shapes(replace(config, qkv_bias=True, tie_weights=False)):
            theirs = self.prefix + ours
            for before, after in pairs:
                theirs = theirs.replace(before, after)
            several = [theirs.replace("*", part) for part in self.stacked]
            result[ours] = several if "*" in theirs else [theirs]
        return result

    def turns(self, ours: str) -> bool:
        """Whether a tensor is stored transposed."""
        return self.transposed and ours.endswith("weight") and (".att." in ours or ".ff." in ours)


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What fails while a file's content is taken apart is a DataError that names the file."""
    try:
        yield
    except KeyError as missing:
        raise DataError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, struct.error) as error:
        raise DataError(f"{path}: {error}") from None


def adopt(
    table: Table, source: Mapping[str, Tensor], config: GPTConfig, path: Path, format: str
) -> Checkpoint:
    """The model whose tensors are in `source`, under our names.

    What is stored settles whether a head is tied and whether qkv have biases. Everything that is
    missing, left over, of another shape or no floating-point number is named in one DataError.
    """
    if config.n_layers > len(source):  # before a damaged number makes a giant table
        raise DataError(f"{path}: {len(source)} tensors cannot hold {config.n_layers} layers")
    names = table.names(config)
    config = _settled(names, source, config)
    expected: dict[str, tuple[int, ...]] = {}
    for ours, (rows, *columns) in shapes(config).items():
        shape = (rows // len(names[ours]), *columns)
        expected |= dict.fromkeys(names[ours], shape[::-1] if table.turns(ours) else shape)
    known = {name for theirs in names.values() for name in theirs}
    problems = {
        "missing": [name for name in expected if name not in source],
        "unexpected": [n for n in source if n not in known and not re.fullmatch(table.ignore, n)],
        "misshaped": [
            f"{name} is {wrong}"
            for name, shape in expected.items()
            if name in source and (wrong := _misfit(source[name], shape))
        ],
    }
    said = [
        f"{what}: {', '.join(found[:5])}{f' and {len(found) - 5} more' if found[5:] else ''}"
        for what, found in problems.items()
        if found
    ]
    if said:
        raise DataError(f"{path}: the tensors do not fit the configuration; {'; '.join(said)}")
    tensors = {}
    for ours in shapes(config):
        parts = [source[name] for name in names[ours]]
        tensor = torch.cat(parts) if parts[1:] else parts[0]
        tensors[ours] = tensor.T if table.turns(ours) else tensor
    return Checkpoint(path, format, config, tensors)


def _settled(names: Names, source: Mapping[str, Tensor], config: GPTConfig) -> GPTConfig:
    """The configuration, but for a head that is not the embedding, and biases that are not zero."""
    (embedding,), (head,) = names["tok_emb.weight"], names["out_head.weight"]
    if config.tie_weights and head in source and embedding in source:
        config = replace(config, tie_weights=torch.equal(source[head], source[embedding]))
    biases = [name for ours in names if ours.endswith("qkv.bias") for name in names[ours]]
    if any(bool(source[name].any()) for name in biases if name in source):
        config = replace(config, qkv_bias=True)
    return config


def _misfit(tensor: Tensor, shape: tuple[int, ...]) -> str:
    if tensor.shape != shape:
        transposed = " (transposed)" if tensor.shape == shape[::-1] else ""
        return f"{tuple(tensor.shape)}, expected {shape}{transposed}"
    return "" if tensor.dtype in DTYPES.values() else f"of {tensor.dtype}"


def export(table: Table, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors under their names, which map one to one; zeros for the biases it does without."""
    config, tensors = checkpoint.config, checkpoint.verified()
    names, dtype = table.names(config), tensors["tok_emb.weight"].dtype
    result = {}
    for ours, shape in shapes(replace(config, qkv_bias=True)).items():
        tensor = tensors[ours] if ours in tensors else torch.zeros(shape, dtype=dtype)
        result[names[ours][0]] = tensor.T if table.turns(ours) else tensor
    return result
