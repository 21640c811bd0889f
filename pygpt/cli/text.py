"""Verbs for text and tokens: tokenizer train, encode, decode."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tyro.conf import Positional

from pygpt import Tokenizer
from pygpt.cli.folders import load_tokenizer
from pygpt.data.readers import list_files, read_documents
from pygpt.errors import DataError


def train(
    files: Positional[tuple[Path, ...]],
    /,
    *,
    out: Path = Path("tokenizer.json"),
    vocab_size: int = 4096,
    pattern: str = "gpt2",
    special_tokens: tuple[str, ...] = ("<|endoftext|>",),
    min_frequency: int = 2,
    text_key: str = "text",
    json: bool = False,
) -> int:
    """Train a byte-level BPE vocabulary on text.

    Example: pygpt tokenizer train books/ --vocab-size 8192 --out books.json

    Args:
        files: Text, jsonl, json, csv or tsv files, or folders of them.
        out: Where to save it: a .json file (Hugging Face's format), a .tiktoken file or a folder.
        vocab_size: Number of tokens, special ones included.
        pattern: How text is cut before merging: gpt2, cl100k_base, o200k_base, or a regular
            expression.
        special_tokens: Tokens that no text contains by itself.
        min_frequency: Leave out merges seen less often.
        text_key: Where the text stands in a row of jsonl, json, csv or tsv.
        json: Print one JSON object.
    """
    began = time.perf_counter()
    characters = 0

    def texts() -> Iterator[str]:  # one by one: the corpus may be larger than memory
        nonlocal characters
        for file in list_files(files):
            for text in read_documents(file, text_key):
                characters += len(text)
                yield text

    def show(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,} merges", end="", file=sys.stderr, flush=True)

    watched = sys.stderr.isatty()
    tok = Tokenizer.train(
        texts(),
        vocab_size,
        pattern=pattern,
        special_tokens=special_tokens,
        min_frequency=min_frequency,
        progress=show if watched else None,
    )
    if watched:
        print(file=sys.stderr)
    tok.save(out)
    seconds = time.perf_counter() - began
    if json:
        said = {"out": str(out), "n_vocab": tok.n_vocab, "characters": characters}
        print(json_module.dumps({**said, "seconds": round(seconds, 3)}))
    else:
        print(f"{out}: {tok.n_vocab} tokens from {characters:,} characters in {seconds:.2f} s")
    return 0


def encode(
    tokenizer: Positional[str],
    files: Positional[tuple[Path, ...]] = (),
    /,
    *,
    count: bool = False,
    special: bool = False,
    json: bool = False,
) -> int:
    """Text to token ids, one line of ids per file; standard input if no file is given.

    Example: echo -n "Hello, world" | pygpt tokenizer encode gpt2

    Args:
        tokenizer: A published vocabulary ("gpt2"), a tokenizer file, or a model's folder.
        files: UTF-8 text files.
        count: Print only the number of tokens.
        special: Text such as <|endoftext|> becomes the special token instead of plain characters.
        json: Print one JSON object a file.
    """
    tok = load_tokenizer(tokenizer)
    for name, text in _texts(files):
        if count and not special:
            result: int | list[int] = tok.count(text)
        else:
            ids = tok.encode(text, allowed_special="all") if special else tok.encode_ordinary(text)
            result = len(ids) if count else ids
        if json:
            print(json_module.dumps({"file": name, "count" if count else "ids": result}))
        elif isinstance(result, int):
            print(result if len(files) < 2 else f"{result}\t{name}")
        else:
            print(*result)
    return 0


def decode(tokenizer: Positional[str], ids: Positional[tuple[int, ...]] = (), /) -> int:
    """Token ids to text; ids come from standard input if none are given.

    Example: pygpt tokenizer decode gpt2 15496 11 995

    Args:
        tokenizer: A published vocabulary ("gpt2"), a tokenizer file, or a model's folder.
        ids: The ids.
    """
    tok = load_tokenizer(tokenizer)
    decoder = tok.stream_decoder()
    for token in ids or _stdin_ids():
        sys.stdout.write(decoder.push(token))
    sys.stdout.write(decoder.flush())
    sys.stdout.flush()
    return 0


def _texts(files: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
    if not files:
        yield "-", _utf8(sys.stdin.buffer.read(), "standard input")
    for path in files:
        yield str(path), _utf8(path.read_bytes(), str(path))


def _utf8(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from None


def _stdin_ids() -> Iterator[int]:
    for number, line in enumerate(sys.stdin, 1):
        for word in line.split():
            try:
                yield int(word)
            except ValueError:
                raise DataError(f"line {number}: {word!r} is not a token id") from None
