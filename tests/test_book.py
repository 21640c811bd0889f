"""Exact figures printed in the book that are not shown with the room they belong to."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from pygpt import Tokenizer, ops
from tests.conftest import TEXT


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


def replaced(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    result: list[int] = []
    rest = iter([*ids, None])
    last = next(rest)
    for this in rest:
        if (last, this) == pair:
            result.append(new)
            this = next(rest)
        else:
            result.append(last)
        last = this
    return result


@pytest.mark.parametrize(("source", "vocab_size"), [("the-verdict.txt", 1000), (TEXT, 300)])
def test_a_vocabulary_has_the_books_merges(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, vocab_size: int
) -> None:
    """The book's tokenizer starts from 256 letters, "\u0120" for a space, and one special token, so
    that 1,000 tokens are 742 merges; ours has the space among its 256 bytes. The book merges across
    words and counts neighbours: each of our merges must be a most frequent pair of those.
    """
    text = source
    if source.endswith(".txt"):
        text = (request.getfixturevalue("data_folder") / source).read_text(encoding="utf-8")
    tok = Tokenizer.train([text], vocab_size - 1, pattern=r"[\s\S]+")
    tok.save(tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    assert len(merges) == vocab_size - 258
    byte_ids = {tok.decode_single_token_bytes(i): i for i in range(256)}
    ids = [byte_ids[bytes([byte])] for byte in text.encode()]
    for new, (left, right) in enumerate(merges, 256):
        pair = model["vocab"][left], model["vocab"][right]
        counts = Counter(itertools.pairwise(ids))
        assert counts[pair] == max(counts.values()), (left, right)
        ids = replaced(ids, pair, new)
    assert tok.encode_ordinary(text) == ids
