"""What all formats share: tensors that are read when asked for, and tables that rename them.

Our names are those of `pygpt.model.GPT`'s state dict. A format is a table of `Rule`s; reading goes
through `adopt`, which checks every name and shape before a single tensor is read, and writing
through `export`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pygpt.config import GPTConfig
from pygpt.errors import DataError


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
        """A contiguous copy in memory of its own, which a change of the file cannot reach."""
        source = self.read()
        return torch.empty(self.shape, dtype=dtype or self.dtype, device=device).copy_(source)


@dataclass(frozen=True)
class Rule:
    """Our parameter `ours` is their `theirs`; `*` stands for the number of the block.

    Several of theirs are our one, stacked by rows. `transposed`: theirs are stored (in, out).
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False

    def names(self, config: GPTConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(our name, their names) for every block, or once where the rule has no `*`."""
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        for block in range(config.n_layers if "*" in self.ours else 1):
            number = str(block)
            yield self.ours.replace("*", number), tuple(t.replace("*", number) for t in theirs)


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

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in turn, as stored unless `dtype` says otherwise."""
        for name, tensor in self.tensors.items():
            yield name, tensor.load(dtype, device)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `GPT(config)`, in the order of its state dict."""
    c = config.emb_dim
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        "att.qkv.weight": (3 * c, c),
        "att.qkv.bias": (3 * c,),
        "att.out.weight": (c, c),
        "att.out.bias": (c,),
        "norm2.weight": (c,),
        "norm2.bias": (c,),
        "ff.up.weight": (4 * c, c),
        "ff.up.bias": (4 * c,),
        "ff.down.weight": (c, 4 * c),
        "ff.down.bias": (c,),
    }
    if not config.qkv_bias:
        del block["att.qkv.bias"]
    result: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (config.vocab_size, c),
        "pos_emb.weight": (config.context_length, c),
    }
    for n in range(config.n_layers):
        result |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    result |= {"final_norm.weight": (c,), "final_norm.bias": (c,)}
    if not config.tie_weights:
        result["out_head.weight"] = (config.vocab_size, c)
    return result


def stack(parts: Iterable[LazyTensor]) -> LazyTensor:
    """Tensors one below the other; a single one stays as it is."""
    first, *others = parts
    if not others:
        return first
    rows = first.shape[0] + sum(other.shape[0] for other in others)
    return LazyTensor(
        (rows, *first.shape[1:]),
        first.dtype,
        lambda: torch.cat([part.read() for part in (first, *others)]),
    )


def adopt(
    rules: Iterable[Rule],
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
    missing: list[str] = []
    misshaped: list[str] = []
    for rule in rules:
        for ours, theirs in rule.names(config):
            known.update(theirs)
            if ours not in wanted:
                continue
            rows, *columns = wanted[ours]
            shape = (rows // len(theirs), *columns)
            shape = shape[::-1] if rule.transposed else shape
            parts = []
            for name in theirs:
                if name not in source:
                    missing.append(name)
                    continue
                part = source[name]
                if part.shape != shape:
                    why = " (transposed)" if part.shape == shape[::-1] else ""
                    misshaped.append(f"{name} is {part.shape}, expected {shape}{why}")
                parts.append(part.transposed if rule.transposed else part)
            if len(parts) == len(theirs):
                result[ours] = stack(parts)
    extra = [n for n in source if n not in known and not re.fullmatch(ignore, n)]
    problems = []
    for what, names in (("missing", missing), ("unexpected", extra), ("misshaped", misshaped)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what}: {', '.join(names[:5])}{more}")
    if problems:
        raise DataError(f"{path}: the tensors do not fit the configuration; {'; '.join(problems)}")
    return {name: result[name] for name in wanted}


def export(
    rules: Iterable[Rule], tensors: Mapping[str, LazyTensor], config: GPTConfig
) -> dict[str, LazyTensor]:
    """Our tensors under their names; for tables that map one to one."""
    result = {}
    for rule in rules:
        for ours, (theirs,) in rule.names(config):
            if ours in tensors:
                result[theirs] = tensors[ours].transposed if rule.transposed else tensors[ours]
    return result
