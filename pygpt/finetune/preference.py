"""Preference tuning: of two answers to a task, the better one becomes more probable.

Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model", 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt.config import LoRAConfig, TrainConfig
from pygpt.finetune.instruction import InstructModel, encode, example_batch
from pygpt.finetune.lora import LoRAModel
from pygpt.finetune.records import (
    Instruction,
    Preference,
    Source,
    load_parts,
    read_preferences,
    write,
)
from pygpt.finetune.tuning import (
    Order,
    batches_by_length,
    book_config,
    check_vocabulary,
    evaluating,
    fingerprint,
    tune,
)
from pygpt.tokenizer import Tokenizer
from pygpt.training import Batch, Event, choose_device, choose_dtype


def prefer(
    chat: InstructModel,
    tok: Tokenizer,
    data: Source | Mapping[str, Source],
    config: TrainConfig | None = None,
    *,
    out: str | Path,
    beta: float = 0.1,
    lora: LoRAConfig | None = None,
    split: tuple[float, float, float] = (0.85, 0.05, 0.10),
    resume: str | Path = "auto",
    on_event: Callable[[Event], None] | None = None,
) -> InstructModel:
    """Teach a copy of `chat` to give the chosen answers rather than the rejected; `chat` stays.

    `data` is whatever `read_preferences` takes, split as by `instruct`. The loss is that of direct
    preference optimisation, log 2 at the start; `beta` says how dear it is to leave the model that
    `chat` was. Without a `config`: the book's one epoch in batches of 8 at 5e-6. Evaluations give,
    beside the loss, the share of pairs in which the chosen answer gained more (`val_accuracy`) and
    by how much, in nats times beta (`val_margin`).

    >>> best = prefer(chat, tok, "prefs.json", out="runs/best")  # doctest: +SKIP
    """
    check_vocabulary(chat.model, tok)
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta must be a finite number above 0, got {beta!r}")
    parts = load_parts(data, read_preferences, split, 0 if config is None else config.seed)
    config = config or book_config(len(parts["train"]), epochs=1, lr=5e-6)
    model = copy.deepcopy(chat.model).to(choose_device(config.device))
    result = InstructModel(model, tok, chat.template)
    task = _PreferenceTuning(parts, result, config, beta, lora and asdict(lora))
    tune(
        model if lora is None else LoRAModel(model, lora),
        task,
        config,
        out=out,
        resume=resume,
        tokenizer=tok,
        on_event=on_event,
    )
    result.save_template(Path(out) / "model")
    if parts["test"]:
        write(parts["test"], Path(out) / "test.jsonl")
    return result


class _Pairs:
    """Chosen and rejected answers, and by how much the untuned model prefers the chosen ones."""

    def __init__(
        self, chat: InstructModel, rows: Sequence[Preference], batch_size: int, dtype: torch.dtype
    ) -> None:
        answers = [[row.chosen for row in rows], [row.rejected for row in rows]]
        # What is left out has too long a prompt, so that both lists lack the same rows.
        self.chosen, self.rejected = (
            encode(
                chat,
                [
                    Instruction(row.instruction, row.input, a)
                    for row, a in zip(rows, given, strict=True)
                ],
                mask_prompt=True,
            )
            for given in answers
        )
        pairs = zip(self.chosen, self.rejected, strict=True)
        self.lengths = [max(len(a.ids), len(b.ids)) for a, b in pairs]
        self.reference = torch.zeros(len(self.lengths))
        with evaluating(chat.model) as device:
            autocast = torch.autocast(device.type, torch.bfloat16, dtype is torch.bfloat16)
            for chosen in batches_by_length(self.lengths, batch_size):
                batch = {name: x.to(device) for name, x in self.batch(chosen).items()}
                with autocast:
                    self.reference[chosen] = _preference(chat.model, batch).cpu()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The chosen answers, then the rejected ones, and the reference of each pair."""
        examples = [self.chosen[i] for i in indices] + [self.rejected[i] for i in indices]
        return {**example_batch(examples), "reference": self.reference[indices]}


def _preference(model: nn.Module, batch: Batch) -> Tensor:
    """log p(chosen) - log p(rejected) of each pair, (B,), in nats."""
    losses: Tensor = model.loss(batch["ids"], batch["targets"], reduction="none")  # type: ignore[operator]
    chosen, rejected = losses.float().sum(-1).chunk(2)
    return rejected - chosen


class _PreferenceTuning:
    """The task for `training.fit`."""

    name = "prefer"

    def __init__(
        self,
        parts: Mapping[str, list[Preference]],
        chat: InstructModel,
        config: TrainConfig,
        beta: float,
        method: Any,
    ) -> None:
        self.beta, self.batch_size = beta, config.micro_batch_size or config.batch_size
        limit = config.eval_batches * self.batch_size or len(parts["validation"])
        dtype = choose_dtype(config.dtype, chat.model.head_weight.device, chat.model)
        self.pairs = _Pairs(chat, parts["train"], self.batch_size, dtype)
        self.held_out = _Pairs(chat, parts["validation"][:limit], self.batch_size, dtype)
        self.order = Order(self.pairs.lengths, config.batch_size, config.seed)
        ids = [[a.ids, b.ids] for a, b in zip(self.pairs.chosen, self.pairs.rejected, strict=True)]
        self.fingerprint = fingerprint(ids, beta, method)

    def batch(self, positions: range) -> Batch:
        return self.pairs.batch(self.order[positions])

    def margins(self, model: nn.Module, batch: Batch) -> Tensor:
        """How much the chosen answer of each pair gained over the rejected one, times beta."""
        return self.beta * (_preference(model, batch) - batch["reference"])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return -F.logsigmoid(self.margins(model, batch)).sum(), len(batch["reference"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        margins = torch.zeros(len(self.held_out.lengths))
        with evaluating(model) as device:
            for chosen in batches_by_length(self.held_out.lengths, self.batch_size):
                batch = {name: x.to(device) for name, x in self.held_out.batch(chosen).items()}
                margins[chosen] = self.margins(model, batch).cpu()
        return {
            "val_loss": float(-F.logsigmoid(margins).mean()),
            "val_accuracy": float((margins > 0).float().mean()),
            "val_margin": float(margins.mean()),
        }
