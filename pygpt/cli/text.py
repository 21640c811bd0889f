"""Verbs for text and tokens: tokenizer train, encode, decode."""

from __future__ import annotations

import io
import json as json_module
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tyro.conf import Positional

from pygpt import Tokenizer
from pygpt.cli.folders import load_tokenizer
from pygpt.data.readers import list_files, read_documents
from pygpt.errors import DataError, UsageError
from pygpt.tokenizer.patterns import native_name


def train(
    files: Positional[tuple[Path, ...]] = (),
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
    """Train a byte-level BPE vocabulary on text, from standard input if no file is given.

    Example: pygpt tokenizer train books/ --vocab-size 8192 --out books.json

    Args:
        files: Text, jsonl, json, csv or tsv files, or folders of them.
        out: Where to save it: a .json file (Hugging Face's format), a .tiktoken file or a folder.
        vocab_size: Number of tokens, special ones included.
        pattern: How text is cut before merging: gpt2, cl100k, o200k, or a regular expression.
        special_tokens: Tokens that no text contains by itself.
        min_frequency: Leave out merges seen less often.
        text_key: Where the text stands in a row of jsonl, json, csv or tsv.
        json: Print one JSON object.
    """
    if out.suffix not in ("", ".json", ".tiktoken"):
        raise UsageError(f"--out {out}: name a .json or .tiktoken file, or a folder without suffix")
    began = time.perf_counter()
    characters = 0
    watched = sys.stderr.isatty()

    def show(what: str) -> None:
        if watched:
            print(f"\r{what:40}", end="", file=sys.stderr, flush=True)

    def texts() -> Iterator[str]:  # one by one: the corpus may be larger than memory
        nonlocal characters
        for text in _corpus(files, text_key, 1 << 24 if native_name(pattern) else -1):
            characters += len(text)
            show(f"{characters:,} characters")
            yield text

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tok = Tokenizer.train(
            texts(),
            vocab_size,
            pattern=pattern,
            special_tokens=special_tokens,
            min_frequency=min_frequency,
            progress=lambda done, total: show(f"{done:,} of {total:,} merges"),
        )
    show("")
    for warning in caught:
        print(f"pygpt: {warning.message}", file=sys.stderr)
    tok.save(out)
    if out.suffix == ".tiktoken":
        print(
            f"pygpt: {out} holds neither pattern nor special tokens; give them to "
            "Tokenizer.from_file, or save a .json file, which this command reads",
            file=sys.stderr,
        )
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
        try:
            sys.stdout.write(decoder.push(token))
        except (KeyError, OverflowError):
            raise UsageError(f"{token} is no token id of {tok.name}") from None
    sys.stdout.write(decoder.flush())
    sys.stdout.flush()
    return 0


def _corpus(files: tuple[Path, ...], text_key: str, size: int) -> Iterator[str]:
    """The documents to train on, plain text in parts of about `size` characters."""
    if not files and sys.stdin.isatty():
        raise UsageError("no files were given, and standard input is a terminal")
    if not files:
        yield from _parts(sys.stdin.buffer, "standard input", size)
    for path in list_files(files) if files else ():
        if path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".tsv"):
            yield from read_documents(path, text_key)
        else:
            with path.open("rb") as file:
                yield from _parts(file, str(path), size)


def _parts(file: IO[bytes], name: str, size: int) -> Iterator[str]:
    """Text as `read_documents` gives it, cut where every pattern cuts.

    That is before a space after a letter, and after a newline that stands alone before a letter.
    With `size` -1 all of it.
    """
    reader = io.TextIOWrapper(file, "utf-8-sig")
    rest = ""
    seen = False
    try:
        while text := reader.read(size):
            if "\0" in text:
                raise DataError(f"{name} is binary, not text: it has a zero byte")
            seen = seen or not text.isspace()
            rest += text
            cut = re.search(r"[^\W\d_](?= )|\S\n(?=[^\W\d_])", rest[-1000:]) if size > 0 else None
            if cut:
                end = max(len(rest) - 1000, 0) + cut.end()
                yield rest[:end]
                rest = rest[end:]
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 ({error.reason})") from None
    finally:
        reader.detach()
    if not seen:
        raise DataError(f"{name} is empty")
    yield rest


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
