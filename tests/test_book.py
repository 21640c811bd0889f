"""Exact figures printed in the book that are not shown with the room they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pygpt import Tokenizer, ops


def test_the_verdict_has_the_books_tokens(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (data_folder / "the-verdict.txt").read_text(encoding="utf-8")
    assert len(text) == 20_479
    cache = data_folder / "tokenizers" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("no tiktoken cache in the data folder")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache.resolve()))
    ids = Tokenizer.from_pretrained("gpt2").encode(text)
    assert len(ids) == 5_145
    assert ids[:5] == [40, 367, 2885, 1464, 1807]  # the first window and its targets


@pytest.mark.parametrize(
    ("targets", "loss"), [([0, 1], 1.1269), ([0, 1, 1], 0.7936), ([0, 1, -100], 1.1269)]
)
def test_masked_targets_give_the_books_toy_losses(targets: list[int], loss: float) -> None:
    logits = torch.tensor([[-1.0, 1.0], [-0.5, 1.5], [-0.5, 1.5]])[: len(targets)]
    ours = ops.cross_entropy(logits, torch.tensor(targets))
    assert round(float(ours), 4) == loss
