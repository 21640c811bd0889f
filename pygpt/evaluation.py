"""How good a model is: on plain text, on labelled texts, on instructions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from pygpt.data import list_files, read_documents
from pygpt.errors import DataError, NumericError, UsageError
from pygpt.finetune.classification import Classifier
from pygpt.finetune.instruction import InstructModel
from pygpt.finetune.tuning import batches_by_length, check_vocabulary, end_of_text, evaluating, pad
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer

Kind = Literal["text", "classification", "instruction"]


def evaluate(
    model: GPT | Classifier | InstructModel,
    tok: Tokenizer | None,
    kind: Kind,
    data: Any,
    *,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Figures for `model` on `data`, as plain values.

    "text" wants a GPT and its tokenizer, and files or folders as for `data.prepare`: see
    `text_figures`. "classification" wants a `Classifier` and labelled texts: see `Report`.
    "instruction" wants an `InstructModel` and instructions: see `InstructModel.report`; both know
    their tokenizers.

    >>> evaluate(model, tok, "text", "book.txt")["perplexity"]  # doctest: +SKIP
    31.4
    """
    if kind == "text" and isinstance(model, GPT) and tok is not None:
        texts = (text for file in list_files(data) for text in read_documents(file))
        return text_figures(model, tok, texts, batch_size=batch_size)
    if kind == "classification" and isinstance(model, Classifier):
        return model.report(data, batch_size=batch_size).to_dict()
    if kind == "instruction" and isinstance(model, InstructModel):
        return model.report(data, batch_size=batch_size)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    wanted = {"text": "a GPT and its tokenizer", "classification": "a Classifier"}
    raise UsageError(
        f"{kind!r} evaluates {wanted.get(kind, 'an InstructModel')}, got a {type(model).__name__}"
    )


def text_figures(
    model: GPT, tok: Tokenizer, texts: Iterable[str], *, batch_size: int = 16
) -> dict[str, Any]:
    """How well `model` predicts whole texts: nats a token, perplexity, bits a character and a byte.

    Every token is predicted once. Texts longer than the context are read in windows that overlap
    by half, so that beyond the first window each token has at least half a context before it. The
    first token of a text follows end-of-text; a tokenizer without one pays log(vocab_size) for it.
    """
    check_vocabulary(model, tok)
    texts = [text for text in texts if text]
    rows = tok.encode_ordinary_batch(texts)
    tokens = sum(map(len, rows))
    if not tokens:
        raise DataError("there is no text to evaluate on")
    begin = end_of_text(tok)
    total = 0.0 if begin else len(rows) * math.log(model.config.vocab_size)
    rows = [begin + ids for ids in rows]
    context = model.config.context_length
    windows = [window for ids in rows for window in _windows(ids, context)]
    with evaluating(model) as device:
        for batch in batches_by_length([len(ids) for ids, _ in windows], batch_size):
            ids = pad([windows[i][0][:-1] for i in batch])
            targets = pad([_targets(*windows[i]) for i in batch], -100)
            total += float(model.loss(ids.to(device), targets.to(device), reduction="sum"))
    if not math.isfinite(total):
        raise NumericError(f"the loss on this text is {total}; are the weights damaged?")
    bits = total / math.log(2)
    return {
        "tokens": tokens,
        "loss": total / tokens,
        "perplexity": math.exp(min(total / tokens, 700)),
        "bits_per_character": bits / sum(map(len, texts)),
        "bits_per_byte": bits / sum(len(text.encode()) for text in texts),
    }


def _windows(ids: Sequence[int], context: int) -> Iterator[tuple[Sequence[int], int]]:
    """Stretches of at most `context` + 1 ids; how many at the end of each are to be scored."""
    done = 1  # the first id is given
    while done < len(ids):
        stop = min(max(context + 1, done + max(1, context // 2)), len(ids))
        yield ids[max(0, stop - context - 1) : stop], stop - done
        done = stop


def _targets(ids: Sequence[int], scored: int) -> list[int]:
    return [-100] * (len(ids) - 1 - scored) + list(ids[len(ids) - scored :])
