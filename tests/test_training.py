"""One loop: exact under accumulation, resuming, signals and kills; loud about everything else."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pygpt import TrainConfig
from pygpt.errors import Stopped
from pygpt.training import Batch, Event, fit

VOCAB, WIDTH = 23, 8
CONFIG = TrainConfig(steps=12, batch_size=4, lr=5e-2, eval_every=5, checkpoint_every=4)


class Small(nn.Module):
    """Embedding, dropout, matrix and bias: the least that has all that the loop must get right."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(ids)))

    def save_pretrained(self, folder: Path, tokenizer: Any = None) -> None:
        save_file(dict(self.named_parameters()), folder / "model.safetensors")


class Successor:
    """Each id is followed by id + 1; samples have different numbers of targets."""

    name = "successor"
    fingerprint = "of the numbers"

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def batch(self, positions: range) -> Batch:
        ids = torch.tensor([[(p + t) % (VOCAB - 1) for t in range(6)] for p in positions])
        targets = ids + 1
        for row, p in enumerate(positions):
            targets[row, 1 + p % 5 :] = -100
        return {"ids": ids, "targets": targets}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        time.sleep(self.delay)
        logits, targets = model(batch["ids"]), batch["targets"]
        summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return summed, int((targets >= 0).sum())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        summed, count = self.loss(model, self.batch(range(8)))
        return {"val_loss": float(summed) / count}


def changed(**changes: Any) -> TrainConfig:
    return TrainConfig.from_dict({**CONFIG.to_dict(), **changes})


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_training_lowers_the_loss_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    run = fit(Small(), Successor(), changed(steps=60), out=tmp_path / "run")
    losses = [entry["loss"] for entry in run.metrics if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert [e["step"] for e in run.metrics if "loss" in e] == list(range(1, 61))
    assert [e["step"] for e in run.metrics if "val_loss" in e] == list(range(0, 61, 5))
    assert run.about["data"] == Successor.fingerprint
    assert run.about["machine"]["threads"] == torch.get_num_threads()
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["step-56", "step-60"]


def stop_at(step: int, number: int = signal.SIGINT) -> Any:
    def on_event(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), number)

    return on_event


@pytest.mark.parametrize("step", [1, 3, 4, 5, 11])
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    whole = fit(Small(), Successor(), CONFIG, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(Small(), Successor(), CONFIG, out=tmp_path / "cut", on_event=stop_at(step))
    cut = fit(Small(seed=9), Successor(), CONFIG, out=tmp_path / "cut")
    assert digest(cut.folder) == digest(whole.folder)
    timeless = ("step", "loss", "lr", "grad_norm", "val_loss")
    for a, b in zip(whole.metrics, cut.metrics, strict=True):
        assert {k: a[k] for k in timeless if k in a} == {k: b[k] for k in timeless if k in b}
