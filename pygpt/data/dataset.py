"""A prepared data set: a folder of two token shards, `tokenizer.json` and `data.json`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pygpt.data.permutation import mix, shuffled
from pygpt.data.readers import Paths, list_files, read_documents
from pygpt.data.shards import HEADER, open_shard, write_shard
from pygpt.errors import DataError

if TYPE_CHECKING:
    from pygpt.tokenizer import Tokenizer

_ENCODED_TOGETHER = 1 << 24  # characters; bounds the memory that encoding takes


@dataclass(frozen=True)
class Split:
    """One part of a data set: its ids (memory-mapped) and how much text they stand for."""

    ids: NDArray[Any]
    documents: int
    characters: int

    def starts(self, context_length: int) -> NDArray[np.int64]:
        """Where windows of `context_length` + 1 ids begin, each sharing one id with the next."""
        return np.arange(0, self.ids.size - context_length, context_length, dtype=np.int64)

    def window(self, starts: NDArray[np.int64], context_length: int) -> NDArray[np.int64]:
        """The ids (len(starts), context_length + 1) that begin at `starts`."""
        window: NDArray[np.int64] = self.ids[starts[:, None] + np.arange(context_length + 1)]
        return window.astype(np.int64)


@dataclass(frozen=True)
class Dataset:
    """Token shards on disk; `Dataset.open` verifies them."""

    folder: Path
    vocab_size: int
    train: Split
    validation: Split
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """The data set in `folder`; DataError if it is damaged or incomplete."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "data.json").read_text())
            ids = {name: open_shard(folder / f"{name}.ids") for name in ("train", "validation")}
            splits = {name: Split(ids[name], **about[name]) for name in ids}
            vocab_size = about["vocab_size"]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no prepared data: {error.filename} is missing; run prepare"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / 'data.json'} is damaged ({error}); run prepare again"
            ) from None
        sha = hashlib.sha256()
        for name in ("train", "validation"):
            with open(folder / f"{name}.ids", "rb") as file:
                sha.update(file.read(HEADER))  # holds the sha256 of the ids
        return cls(folder, vocab_size, splits["train"], splits["validation"], sha.hexdigest())

    def batch(self, positions: Sequence[int], context_length: int, seed: int) -> NDArray[np.int64]:
        """The training windows (len(positions), context_length + 1) at `positions` of the order.

        Each epoch visits every window once, in its own order and shifted by its own offset, so that
        on a small text the windows of two epochs differ. A pure function of its arguments.
        """
        slack = self.train.ids.size - 1 - context_length
        if slack < 0:
            raise DataError(
                f"{self.folder} has {self.train.ids.size} training tokens, fewer than one window "
                f"of context_length + 1 = {context_length + 1}; give more text or a shorter context"
            )
        # One window fewer than would fit leaves room for the offset.
        count = max(1, (self.train.ids.size - 1) // context_length - 1)
        room = min(context_length, self.train.ids.size - count * context_length)
        offsets = np.array([mix(seed, position // count) % room for position in positions])
        return self.train.window(
            shuffled(positions, count, seed) * context_length + offsets, context_length
        )


def prepare(
    paths: Paths,
    tok: Tokenizer,
    out: str | Path,
    *,
    validation: float | Paths = 0.1,
    text_key: str = "text",
    seed: int = 0,
) -> Dataset:
    """Read, split, encode and store text for training.

    `paths` are text, jsonl, json, csv or tsv files, or folders of them; a row's text stands under
    `text_key`. `validation` is files of their own, or a fraction: whole documents chosen by `seed`
    where there are enough of them (20 at a tenth), otherwise the last part of every document. The
    end-of-text token, where the tokenizer has one, stands between documents. Special tokens that
    occur in the text are encoded as ordinary text. Returns the opened `Dataset`.
    """
    documents = [text for file in list_files(paths) for text in read_documents(file, text_key)]
    if isinstance(validation, float | int):
        train, held_out = split_documents(documents, validation, seed)
    else:
        train = documents
        held_out = [t for file in list_files(validation) for t in read_documents(file, text_key)]
    return prepare_texts(train, held_out, tok, out)


def prepare_texts(
    train: Sequence[str], validation: Sequence[str], tok: Tokenizer, out: str | Path
) -> Dataset:
    """Encode and store documents that are already split; `prepare` for texts in memory."""
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "data.json").exists()):
        raise DataError(
            f"{out} is in use for something other than prepared data; choose another folder"
        )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        about: dict[str, Any] = {"vocab_size": tok.n_vocab}
        for name, texts in (("train", train), ("validation", validation)):
            if not write_shard(temporary / f"{name}.ids", _encode(texts, tok), tok.n_vocab):
                raise DataError(f"the {name} split has no text; check the files and the fraction")
            about[name] = {"documents": len(texts), "characters": sum(map(len, texts))}
        (temporary / "data.json").write_text(json.dumps(about, indent=1) + "\n")
        tok.save(temporary / "tokenizer.json")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Dataset.open(out)


def split_documents(
    documents: Sequence[str], fraction: float, seed: int = 0
) -> tuple[list[str], list[str]]:
    """`documents` in two parts, the second about `fraction` of the text; see `prepare`."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation must be files or a fraction between 0 and 1, got {fraction}")
    n = len(documents)
    if n * fraction < 2:
        cuts = [int(len(text) * (1 - fraction)) for text in documents]
        pairs = [(text[:cut], text[cut:]) for text, cut in zip(documents, cuts, strict=True)]
        return [a for a, _ in pairs if a], [b for _, b in pairs if b]
    held_out = set(shuffled(range(round(n * fraction)), n, seed).tolist())
    return (
        [text for i, text in enumerate(documents) if i not in held_out],
        [text for i, text in enumerate(documents) if i in held_out],
    )


def _encode(texts: Iterable[str], tok: Tokenizer) -> Iterator[NDArray[np.uint32]]:
    """The ids of `texts` with end-of-text between them, a few megabytes at a time."""
    end_of_text = "<|endoftext|>" in tok.special_tokens_set
    separator = np.array([tok.eot_token] if end_of_text else [], np.uint32)
    first = True
    for group in _grouped(texts):
        ids, offsets = tok.encode_batch_to_numpy(group, disallowed_special=())
        for start, stop in itertools.pairwise(offsets):
            if not first:
                yield separator
            first = False
            yield ids[start:stop]


def _grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= _ENCODED_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group
