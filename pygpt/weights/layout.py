"""What all formats share: tensors that are read when asked for, and tables that rename them.

Our names are those of `pygpt.model.GPT`'s state dict. A format is a `Table`; reading goes through
`adopt`, which checks every name and shape before a single tensor is read, writing through `export`.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError

# The parts of a GPT, `*` for the number of a block.
PARTS = (
    "tok_emb pos_emb blocks.*.norm1 blocks.*.att.qkv blocks.*.att.out blocks.*.norm2 "
    "blocks.*.ff.up blocks.*.ff.down final_norm out_head"
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape and dtype are known, its data is read by `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def transposed(self) -> LazyTensor:
        """The same matrix with rows and columns exchanged."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.read().T)

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        """The same tensor in another dtype."""
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def load(self, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
        """The data; without a copy where it is mapped and needs no change.

        A transposed float32 matrix stays a view: products with it are as fast, with one or two rows
        up to 1.5 times faster. In 16 bits they are slower, so that those are copied.
        """
        source, dtype = self.read(), dtype or self.dtype
        mapped = source.dtype == dtype and torch.device(device or "cpu") == source.device
        if mapped and (source.is_contiguous() or dtype == torch.float32):
            return source
        return torch.empty(self.shape, dtype=dtype, device=device).copy_(source)


@dataclass(frozen=True)
class Table:
    """How a format calls each of `PARTS`, and the weight and bias of a part.

    Several of its parts with `|` between are our one, stacked by rows. `transposed`: the weights of
    linear layers are stored (in, out).
    """

    parts: str = PARTS
    norm: tuple[str, ...] = (".weight", ".bias")
    linear: tuple[str, ...] = (".weight", ".bias")
    embedding: tuple[str, ...] = (".weight",)
    transposed: bool = False

    def names(self, n_layers: int) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """(our name, their names, transposed) of every tensor that a model can have."""
        for part, theirs in zip(PARTS.split(), self.parts.split(), strict=True):
            linear = not _has_no_bias(part) and "norm" not in part
            suffixes = self.linear if linear else self.norm if "norm" in part else self.embedding
            for kind, suffix in zip((".weight", ".bias"), suffixes, strict=False):
                turned = self.transposed and linear and kind == ".weight"
                for block in map(str, range(n_layers if "*" in part else 1)):
                    names = (f"{name}{suffix}".replace("*", block) for name in theirs.split("|"))
                    yield (part + kind).replace("*", block), tuple(names), turned


@dataclass(frozen=True)
class Checkpoint:
    """A model in a file: its format, configuration and tensors under our names.

    `classifier` holds the weight and bias of the book's classification head, where there is one.
    """

    path: Path
    format: str
    config: GPTConfig
    tensors: Mapping[str, LazyTensor]
    classifier: Mapping[str, LazyTensor] | None = None

    @property
    def folder(self) -> Path:
        """Where the configuration and tokenizer lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """Every tensor, as stored unless `dtype` says otherwise."""
        return {name: tensor.load(dtype, device) for name, tensor in self.tensors.items()}


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `GPT(config)`, in the order of its state dict."""
    v, t, c = config.vocab_size, config.context_length, config.emb_dim
    weights = ((v, c), (t, c), (c,), (3 * c, c), (c, c), (c,), (4 * c, c), (c, 4 * c), (c,), (v, c))

    result: dict[str, tuple[int, ...]] = {}
    blocks = [(n, number) for n in range(config.n_layers) for number in range(2, 8)]
    for n, number in [(0, 0), (0, 1), *blocks, (0, 8), *([] if config.tie_weights else [(0, 9)])]:
        name, shape = PARTS.split()[number].replace("*", str(n)), weights[number]
        result[f"{name}.weight"] = shape
        if not _has_no_bias(name) and (config.qkv_bias or not name.endswith("qkv")):
            result[f"{name}.bias"] = shape[:1]
    return result


def _has_no_bias(part: str) -> bool:
    return part.endswith(("emb", "head"))


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What fails while a file's content is taken apart is a DataError that names the file."""
    try:
        yield
    except KeyError as missing:
        raise DataError(f"{path}: the key {missing} is missing") from None
    except (TypeError, ValueError, AttributeError, IndexError, struct.error) as error:
        raise DataError(f"{path}: {error}") from None


def adopt(
    table: Table,
    source: Mapping[str, LazyTensor],
    config: GPTConfig,
    path: Path,
    *,
    ignore: str = "$^",
) -> dict[str, LazyTensor]:
    """The tensors of `source` under our names.

    Names that match the pattern `ignore` whole may be left over. Everything that is missing, left
    over or of another shape is named in one DataError.
    """
    if config.n_layers > len(source):  # before a damaged number makes a giant table
        raise DataError(f"{path}: {len(source)} tensors cannot hold {config.n_layers} layers")
    wanted, known = shapes(config), set[str]()
    result: dict[str, LazyTensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshaped": []}
    for ours, theirs, transposed in table.names(config.n_layers):
        known.update(theirs)
        if ours not in wanted:
            continue
        rows, *columns = wanted[ours]
        shape = (rows // len(theirs), *columns)
        shape = shape[::-1] if transposed else shape
        parts = {name: source[name] for name in theirs if name in source}
        problems["missing"] += (name for name in theirs if name not in parts)
        for name, part in parts.items():
            if part.shape != shape:
                why = " (transposed)" if part.shape == shape[::-1] else ""
                problems["misshaped"].append(f"{name} is {part.shape}, expected {shape}{why}")
        if parts:
            turned = [part.transposed if transposed else part for part in parts.values()]
            result[ours] = _stack(turned)
    problems["unexpected"] = [
        name for name in source if name not in known and not re.fullmatch(ignore, name)
    ]
    said = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise DataError(f"{path}: the tensors do not fit the configuration; {'; '.join(said)}")
    return {name: result[name] for name in wanted}


def _stack(parts: list[LazyTensor]) -> LazyTensor:
    """Tensors one below the other; a single one stays as it is."""
    if not parts[1:]:
        return parts[0]
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.read() for part in parts]))


def export(table: Table, tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
    """Our tensors under their names; for tables that map one to one."""
    return {
        theirs: tensors[ours].transposed if transposed else tensors[ours]
        for ours, (theirs,), transposed in table.names(n_layers)
        if ours in tensors
    }
