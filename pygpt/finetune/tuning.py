"""What every kind of fine-tuning shares: batches of like length, the run, and its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pygpt.config import TrainConfig
from pygpt.data import mix, shuffled
from pygpt.errors import UsageError
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer
from pygpt.training import Run, Task, fit

_SORTED_TOGETHER = 64  # batches: enough for little padding, few enough for varied company


class Order:
    """The endless training order: every example once an epoch, batches of like length.

    The shuffled examples are sorted by length a stretch at a time, and the batches of a stretch are
    shuffled; which example stands at a position is a pure function of lengths, batch size and seed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = np.array(lengths), batch_size, seed
        # At most an epoch, or equal lengths would bring copies of an example together.
        self._size = batch_size * max(1, min(_SORTED_TOGETHER, len(lengths) // batch_size))
        self._stretch, self._examples = -1, np.empty((0, batch_size), np.int64)

    def __getitem__(self, positions: range) -> list[int]:
        """The examples at `positions`."""
        return [self._at(position) for position in positions]

    def _at(self, position: int) -> int:
        stretch, place = divmod(position, self._size)
        if stretch != self._stretch:
            self._stretch, self._examples = stretch, self._sorted(stretch)
        return int(self._examples[divmod(place, self.batch_size)])

    def _sorted(self, stretch: int) -> NDArray[np.int64]:
        """The batches of a stretch, (batches, batch_size)."""
        positions = range(stretch * self._size, (stretch + 1) * self._size)
        drawn = shuffled(positions, len(self.lengths), self.seed)
        batches = drawn[np.argsort(self.lengths[drawn], kind="stable")].reshape(-1, self.batch_size)
        return batches[shuffled(range(len(batches)), len(batches), mix(self.seed, stretch))]


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The indices of `lengths` in batches of at most `size`, shortest first.

    >>> batches_by_length([5, 1, 5, 2], 2)
    [[1, 3], [0, 2]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Rows of ids as one (B, T) int64 tensor, filled with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def fingerprint(*parts: Any) -> str:
    """The sha256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def book_config(examples: int, epochs: int, lr: float = 5e-5) -> TrainConfig:
    """The book's settings for fine-tuning GPT-2, in batches of 8."""
    per_epoch = max(1, examples // 8)
    return TrainConfig(steps=epochs * per_epoch, batch_size=8, lr=lr, eval_every=per_epoch)


def end_of_text(tok: Tokenizer) -> list[int]:
    """The tokenizer's end-of-text token, if it has one."""
    return [tok.eot_token] if "<|endoftext|>" in tok.special_tokens_set else []


def check_vocabulary(model: GPT, tok: Tokenizer) -> None:
    """UsageError where the tokenizer has ids that the model does not know."""
    if tok.n_vocab > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tok.n_vocab} tokens and the model {model.config.vocab_size}; "
            f"use the tokenizer that the model was trained with"
        )


def tune(model: nn.Module, task: Task, config: TrainConfig, **options: Any) -> Run:
    """`training.fit`; UsageError where it left every trainable parameter as it was."""
    before = [(p, p.detach().cpu().clone()) for p in model.parameters() if p.requires_grad]
    run = fit(model, task, config, **options)
    if all(torch.equal(p.detach().cpu(), old) for p, old in before):
        raise UsageError(f"no parameter changed in {config.steps} steps; raise lr ({config.lr})")
    return run


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def model_folder(folder: str | Path, marker: str, verb: str) -> Path:
    """The folder that holds the file `marker`: `folder`, or the `model` in a run's folder."""
    for candidate in (Path(folder), Path(folder) / "model"):
        if (candidate / marker).exists():
            return candidate
    raise FileNotFoundError(f"{folder} has no {marker}; give the folder of a `{verb}` run")
