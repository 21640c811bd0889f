"""What generation keeps of the tokens seen: keys and values of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygpt.config import GPTConfig


class KVCache:
    """The keys and values of the tokens seen so far: per layer (B, H, capacity, D), allocated once.

    A head's keys lie one after the other, so that a token that attends to them reads memory in
    order: up to half as fast again where they are in no cache of the processor.

    Rows may differ in length. A right-padded batch is encoded as it stands and then cut back with
    `trim`; what the padding left behind is overwritten by the tokens that follow.
    """

    def __init__(self, config: GPTConfig, batch_size: int, capacity: int | None = None) -> None:
        self.capacity = config.context_length if capacity is None else capacity
        self.lengths = [0] * batch_size
        self.keys: list[Tensor | None] = [None] * config.n_layers
        self.values: list[Tensor | None] = [None] * config.n_layers
        self.kv_lengths: Tensor | None = None  # (B,) int32 while rows differ in length, else None
        self._slots: Any = None  # where the tokens of the current call are written

    def advance(self, n_tokens: int, device: torch.device) -> Tensor:
        """Make room for `n_tokens` in every row; returns their positions, (1, T) or (B, T)."""
        longest = max(self.lengths)
        if longest + n_tokens > self.capacity:
            raise ValueError(
                f"the cache holds {longest} of at most {self.capacity} tokens; "
                f"{n_tokens} more do not fit"
            )
        steps = torch.arange(n_tokens, device=device)
        if min(self.lengths) == longest:
            self.kv_lengths = None
            positions = steps[None] + longest
            self._slots = (slice(None), slice(longest, longest + n_tokens))
        else:
            if self.kv_lengths is None:
                self.kv_lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
            positions = self.kv_lengths[:, None].long() + steps
            self.kv_lengths = self.kv_lengths + n_tokens
            self._slots = (torch.arange(len(self.lengths), device=device)[:, None], positions)
        self.lengths = [length + n_tokens for length in self.lengths]
        return positions

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, (B, T, H, D); returns all of them, (B, S, H, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            # Zeros, because a backend that masks by adding would spread a NaN of fresh memory.
            shape = (k.shape[0], k.shape[2], self.capacity, k.shape[3])
            keys = self.keys[layer] = k.new_zeros(shape)
            values = self.values[layer] = v.new_zeros(shape)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        keys[self._slots] = k
        values[self._slots] = v
        longest = max(self.lengths)
        return keys[:, :longest], values[:, :longest]

    def trim(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each row b."""
        if len(lengths) != len(self.lengths) or any(
            not 0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True)
        ):
            raise ValueError(f"cannot trim rows of {self.lengths} tokens to {list(lengths)}")
        self.lengths, self.kv_lengths = list(lengths), None

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but `rows`."""
        self.lengths, self.kv_lengths = [self.lengths[row] for row in rows], None
        self.keys = [None if k is None else k[list(rows)] for k in self.keys]
        self.values = [None if v is None else v[list(rows)] for v in self.values]

    def replace(self, row: int, other: KVCache) -> None:
        """Row `row` becomes the only row of `other`, which has the same capacity."""
        self.lengths[row], self.kv_lengths = other.lengths[0], None
        for ours, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
            if ours is not None and theirs is not None:
                ours[row] = theirs[0]
