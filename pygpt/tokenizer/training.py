"""Training: a corpus to merges."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pygpt import _native
from pygpt.tokenizer.formats import read_text
from pygpt.tokenizer.patterns import compile_pattern, native_name

MAX_VOCAB_SIZE = 2_000_000


def train_merges(
    texts_or_paths: Iterable[str | os.PathLike[str]] | os.PathLike[str],
    vocab_size: int,
    *,
    pattern: str,
    special_tokens: Sequence[str],
    min_frequency: int,
    num_threads: int,
    progress: Callable[[int, int], object] | None,
    memory_budget: int,
) -> list[tuple[int, int]]:
    """The merges of `Tokenizer.train`, as pairs of ids in order; it says what the arguments are."""
    wanted = vocab_size - 256 - len(special_tokens)
    if wanted < 0 or vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be from {256 + len(special_tokens)} (bytes, special tokens) to "
            f"{MAX_VOCAB_SIZE}, got {vocab_size}"
        )
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise ValueError(f"special_tokens must be distinct and not empty, got {special_tokens}")
    if min_frequency < 0:
        raise ValueError(f"min_frequency must not be negative, got {min_frequency}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte, got {memory_budget}")
    if isinstance(texts_or_paths, str):
        raise ValueError(
            "texts_or_paths is one str, which could be a text or a path: "
            "pass [text], or pathlib.Path(path)"
        )
    if isinstance(texts_or_paths, os.PathLike):
        texts_or_paths = [texts_or_paths]

    report = (lambda done: progress(done, wanted)) if progress else None
    trainer = _native.Trainer(num_threads, memory_budget, physical_memory())
    _count_pieces(trainer, texts_or_paths, pattern)
    if trainer.empty:
        raise ValueError("the corpus is empty: there is no text to train on")
    merges = trainer.train(wanted, min_frequency, report)
    if len(merges) < wanted:
        warnings.warn(
            f"no pair occurs {max(min_frequency, 1)} times any more: the vocabulary has "
            f"{len(merges) + 256 + len(special_tokens):,} tokens instead of {vocab_size:,}",
            stacklevel=3,
        )
    return merges


def _count_pieces(
    trainer: _native.Trainer, items: Iterable[str | os.PathLike[str]], pattern: str
) -> None:
    """Feed texts in batches and files to the trainer."""
    name = native_name(pattern)
    for batch in _batches(items):
        if not name:
            counts: Counter[str] = Counter()
            for item in batch:
                text = item if isinstance(item, str) else read_text(item)
                counts.update(m.group() for m in compile_pattern(pattern).finditer(text))
            trainer.add_pieces([(p.encode("utf-8", "replace"), n) for p, n in counts.items()])
        elif isinstance(batch[0], str):
            trainer.add_texts(name, batch)
        else:
            trainer.add_files(name, [os.fspath(item) for item in batch])


def _batches(items: Iterable[Any], size: int = 1 << 24) -> Iterator[list[Any]]:
    """Runs of texts of about `size` characters in all, and runs of paths."""
    batch: list[Any] = []
    held = 0
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise TypeError(f"texts are str and files are Path, got {type(item).__name__}")
        if batch and (held >= size or isinstance(item, str) != isinstance(batch[0], str)):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += len(item) if isinstance(item, str) else 0
    if batch:
        yield batch


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
