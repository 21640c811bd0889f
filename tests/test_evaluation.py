"""Figures for text, labelled texts and instructions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import pygpt
from pygpt.config import GPTConfig
from pygpt.errors import DataError, NumericError, UsageError
from pygpt.evaluation import _windows, evaluate, text_figures
from pygpt.finetune import TEMPLATES, Classifier, InstructModel
from pygpt.finetune.classification import GPTClassifier
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer(*, end_of_text: bool = True) -> Tokenizer:
    """Bytes as tokens."""
    return Tokenizer(
        "bytes",
        pat_str="gpt2",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256} if end_of_text else {},
    )


def small_gpt(context_length: int = 16) -> GPT:
    torch.manual_seed(0)
    shape = {"emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
    return GPT(GPTConfig(vocab_size=257, context_length=context_length, **shape))


@given(n=st.integers(0, 60), context=st.integers(1, 20))
def test_windows_score_every_id_but_the_first_once_with_half_a_context_before_it(n, context):
    scored = []
    for window, count in _windows(range(n), context):
        assert len(window) <= context + 1
        scored += window[-count:]
        assert window[0] == 0 or len(window) - count >= (context + 1) // 2
    assert scored == list(range(1, n))


@pytest.mark.parametrize("text", ["short", "a text that is longer than one window of the model"])
def test_the_loss_is_that_of_each_token_after_what_its_window_shows(text):
    model, context = small_gpt().eval(), 16
    ids = [256, *text.encode()]
    total = 0.0
    for window, count in _windows(ids, context):
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0, -count:]
        total += float(F.cross_entropy(logits, torch.tensor(window[-count:]), reduction="sum"))
    figures = text_figures(model, tokenizer(), [text], batch_size=3)
    assert figures["tokens"] == len(text)
    assert figures["loss"] == pytest.approx(total / len(text), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / len(text)), rel=1e-4)


@pytest.mark.parametrize("end_of_text", [True, False])
def test_a_model_that_knows_nothing_pays_the_same_for_every_token(end_of_text, tmp_path):
    model = small_gpt()
    torch.nn.init.zeros_(model.head_weight)
    (tmp_path / "a.txt").write_text("köpf" * 20, encoding="utf-8")
    (tmp_path / "b.txt").write_text("x", encoding="utf-8")
    tok = tokenizer(end_of_text=end_of_text)
    figures = evaluate(model, tok, "text", tmp_path)
    assert figures["tokens"] == 101
    assert figures["loss"] == pytest.approx(math.log(257))
    assert figures["bits_per_byte"] == pytest.approx(math.log2(257))
    assert figures["bits_per_character"] == pytest.approx(math.log2(257) * 101 / 81)
    assert model.training  # left as it was found


def test_every_kind_evaluates_its_model():
    tok, gpt = tokenizer(), small_gpt(64).eval()
    clf = Classifier(GPTClassifier(gpt, ["a", "b"]), tok)
    figures = evaluate(clf, None, "classification", [("x", "a"), ("y", "b"), ("z", "b")])
    assert figures["majority"] == pytest.approx(2 / 3) and sum(figures["support"]) == 3
    chat = InstructModel(gpt, tok, TEMPLATES["short"])
    figures = evaluate(chat, None, "instruction", [("Say", "a", "b")])
    assert figures["tasks"] == 1 and figures["loss"] > 0
    assert pygpt.evaluate is evaluate


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    tok, gpt = tokenizer(), small_gpt()
    with pytest.raises(ValueError, match="text, classification, instruction, got 'x'"):
        evaluate(gpt, tok, "x", [])
    with pytest.raises(UsageError, match="'classification' evaluates a Classifier, got a GPT"):
        evaluate(gpt, tok, "classification", [])
    with pytest.raises(UsageError, match="'text' evaluates a GPT and its tokenizer"):
        evaluate(gpt, None, "text", [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(gpt, tok, "text", tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="no text"):
        text_figures(gpt, tok, [""])
    torch.nn.init.constant_(gpt.final_norm.weight, math.nan)
    with pytest.raises(NumericError, match="the loss on this text is nan"):
        text_figures(gpt, tok, ["abc"])
