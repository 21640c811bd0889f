"""Byte-level BPE: text to ids and back, training, and the formats that hold a vocabulary.

`Tokenizer` offers the methods of `tiktoken.Encoding`, with the same arguments, results and errors.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pygpt import _native
from pygpt.errors import DataError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EOT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2_000_000

# Patterns with a native splitter, as tiktoken writes them.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
_GPT2_ORIGINAL = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_NATIVE_NAME = {regex: name for name, regex in PATTERNS.items()} | {
    _GPT2_ORIGINAL: "gpt2",
    _GPT2_ORIGINAL.replace(r"\p{L}", r"[\p{L}]").replace(r"\p{N}", r"[\p{N}]", 1): "gpt2",
}
# The same in the dialect of Hugging Face's engine, where $ and {1,3}+ mean something else.
_HF_PATTERNS = {
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": PATTERNS["o200k"],
}
_NATIVE_NAME |= {regex: name for name, regex in _HF_PATTERNS.items()}


class _Published(NamedTuple):
    """A published vocabulary: where tiktoken finds it and what the file does not say."""

    path: str
    sha256: str
    pattern: str
    special_tokens: dict[str, int]


_PUBLISHER = "https://openaipublic.blob.core.windows.net/"
_PUBLISHED = {
    "gpt2": _Published(
        "gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "gpt2",
        {EOT: 50256},
    ),
    "r50k_base": _Published(
        "encodings/r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        "gpt2",
        {EOT: 50256},
    ),
    "p50k_base": _Published(
        "encodings/p50k_base.tiktoken",
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        "gpt2",
        {EOT: 50256},
    ),
    "cl100k_base": _Published(
        "encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "cl100k",
        {
            EOT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": _Published(
        "encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k",
        {EOT: 199999, "<|endofprompt|>": 200018},
    ),
}

AllowedSpecial = Literal["all"] | Set[str]
DisallowedSpecial = Literal["all"] | Collection[str]


class Tokenizer:
    """A byte-level BPE vocabulary that encodes and decodes.

    The constructor is that of `tiktoken.Encoding`: `mergeable_ranks` maps the bytes of each token
    to its id, which is also its priority in merging; `pat_str` is the regular expression that cuts
    a text into pieces ("gpt2", "cl100k" and "o200k" name the built-in ones).

    >>> tok = Tokenizer.train(["low lower lowest"], 258, special_tokens=())
    >>> tok.encode("slow")
    [82, 257]
    """

    def __init__(
        self,
        name: str,
        *,
        pat_str: str,
        mergeable_ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        explicit_n_vocab: int | None = None,
    ) -> None:
        if explicit_n_vocab is not None:
            given = len(mergeable_ranks) + len(special_tokens)
            largest = max([*mergeable_ranks.values(), *special_tokens.values()], default=-1)
            if given != explicit_n_vocab or largest != explicit_n_vocab - 1:
                raise ValueError(
                    f"explicit_n_vocab is {explicit_n_vocab}, but there are {given} tokens and the "
                    f"largest id is {largest}"
                )
        self._set_up(name, pat_str, special_tokens, list(mergeable_ranks.items()))

    def _set_up(
        self,
        name: str,
        pattern: str,
        special_tokens: Mapping[str, int],
        tokens: list[tuple[bytes, int]],
        merges: list[tuple[int, int]] | None = None,
        whole_pieces: bool = True,
    ) -> None:
        """`merges` None: tiktoken's rule; else only these pairs of ids merge, in this order."""
        native_name = _native_name(pattern)
        native = _native.Bpe(
            tokens, merges, whole_pieces, native_name, _special_pairs(special_tokens)
        )
        self._finish(name, pattern, special_tokens, native, merges is None, whole_pieces)

    def _finish(
        self,
        name: str,
        pattern: str,
        special_tokens: Mapping[str, int],
        native: _native.Bpe,
        ids_are_ranks: bool,
        whole_pieces: bool,
    ) -> None:
        self.name = name
        self._pat_str = PATTERNS.get(pattern, pattern)
        self._is_native = bool(_native_name(pattern)) or not _compile(pattern)
        self._special_tokens = dict(special_tokens)
        self._native = native
        self._ids_are_ranks = ids_are_ranks
        self._whole_pieces = whole_pieces
        self.max_token_value = native.size() - 1

    # --- where vocabularies come from ---------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str) -> Tokenizer:
        """A published vocabulary, hash-checked, from tiktoken's cache or else its publisher.

        Names: gpt2, r50k_base, p50k_base, cl100k_base, o200k_base. `TIKTOKEN_CACHE_DIR` says where
        the files are kept.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"unknown vocabulary {name!r}; there are {', '.join(_PUBLISHED)}")
        from tiktoken.load import read_file_cached

        published = _PUBLISHED[name]
        url = _PUBLISHER + published.path
        try:
            data = read_file_cached(url, published.sha256)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise ResourceError(
                f"cannot get the vocabulary {name} from {url}: {error}; connect to the network "
                "once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
            ) from error
        return cls._from_published(name, data)

    @classmethod
    def _from_published(cls, name: str, data: bytes) -> Tokenizer:
        published = _PUBLISHED[name]
        read = _native.Bpe.from_gpt2_merges if name == "gpt2" else _native.Bpe.from_tiktoken
        special_tokens = published.special_tokens
        native = read(data, published.pattern, _special_pairs(special_tokens))
        self = cls.__new__(cls)
        self._finish(name, published.pattern, special_tokens, native, True, True)
        return self

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        pattern: str | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> Tokenizer:
        """A vocabulary from tokenizer.json, a .tiktoken file, or a folder.

        In a folder tokenizer.json comes first, then vocab.json or encoder.json with merges.txt or
        vocab.bpe. A .tiktoken file holds neither pattern nor special tokens: published files are
        known by their hash, for others both arguments are needed. Templates that add special tokens
        (a post-processor) are not applied. Raises DataError for a file that cannot be honoured.
        """
        path = Path(path)
        self = cls.__new__(cls)
        try:
            if path.is_dir() and not (path / "tokenizer.json").exists():
                arguments = _read_gpt2_folder(path, pattern, special_tokens)
            elif path.suffix == ".tiktoken":
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                for name, published in _PUBLISHED.items():
                    if digest == published.sha256 and pattern is None and special_tokens is None:
                        return cls._from_published(name, data)
                if pattern is None or special_tokens is None:
                    raise DataError(
                        f"{path} holds neither pattern nor special tokens and is no published "
                        "vocabulary: give pattern= and special_tokens="
                    )
                native = _native.Bpe.from_tiktoken(
                    data, _native_name(pattern), _special_pairs(special_tokens)
                )
                self._finish(path.stem, pattern, special_tokens, native, True, True)
                return self
            else:
                file = path / "tokenizer.json" if path.is_dir() else path
                arguments = _parse_hf(_read_json(file))
                if pattern is not None:
                    arguments["pattern"] = pattern
                if special_tokens is not None:
                    arguments["special_tokens"] = special_tokens
            self._set_up(path.stem, **arguments)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} has not the shape of a vocabulary file: {error}") from error
        return self

    @classmethod
    def train(
        cls,
        texts_or_paths: Iterable[str | os.PathLike[str]] | os.PathLike[str],
        vocab_size: int,
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (EOT,),
        min_frequency: int = 2,
        num_threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
        memory_budget: int = 1 << 30,
    ) -> Tokenizer:
        """Train a vocabulary of `vocab_size` tokens, special ones included.

        A str is a text, a Path a UTF-8 file. Ids 0 to 255 are the bytes in GPT-2's order, then come
        the merges, last the special tokens. Merges are those of Hugging Face's ByteLevel BPE
        trainer: the most frequent pair first, of equals the one of smallest ids; any number of
        threads gives the same. `progress(done, total)` is called during merging. Warns when no pair
        occurs `min_frequency` times any more and the vocabulary stays smaller.

        The corpus may be larger than memory: counts of its distinct pieces beyond `memory_budget`
        bytes go to unnamed files in TMPDIR (/tmp), and the merges stay the same. Merging itself
        needs about 150 bytes for each distinct piece. Raises ResourceError when disk or memory do
        not suffice.
        """
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
        trainer = _native.Trainer(_threads(num_threads), memory_budget, _physical_memory())
        _count_pieces(trainer, texts_or_paths, pattern)
        if trainer.empty:
            raise ValueError("the corpus is empty: there is no text to train on")
        merges = trainer.train(wanted, min_frequency, report)
        if len(merges) < wanted:
            warnings.warn(
                f"no pair occurs {max(min_frequency, 1)} times any more: the vocabulary has "
                f"{len(merges) + 256 + len(special_tokens):,} tokens instead of {vocab_size:,}",
                stacklevel=2,
            )
        token_bytes = [bytes([b]) for b in _byte_order()]
        for left, right in merges:
            token_bytes.append(token_bytes[left] + token_bytes[right])
        ranks = {token: rank for rank, token in enumerate(token_bytes)}
        specials = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
        return cls("trained", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)

    # --- encoding -----------------------------------------------------------------------------

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are plain text."""
        if not self._is_native:
            return self._encode_pieces(text)
        return self._native.encode_ordinary(text)

    def encode(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[int]:
        """Ids of a text; `allowed_special` tokens in it become their own ids.

        Raises ValueError when the text holds one of `disallowed_special`, by default every special
        token that is not allowed.
        """
        allowed, disallowed = self._choices(allowed_special, disallowed_special)
        if not self._is_native:
            return self._encode_pieces(text, allowed, disallowed)
        return self._native.encode(text, allowed, disallowed)

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> NDArray[np.uint32]:
        """As `encode`, into an array of uint32."""
        allowed, disallowed = self._choices(allowed_special, disallowed_special)
        if self._is_native:
            return self._native.encode_to_numpy(text, allowed, disallowed)
        import numpy as np

        return np.array(self._encode_pieces(text, allowed, disallowed), np.uint32)

    def encode_batch(
        self,
        text: Sequence[str],
        *,
        num_threads: int | None = None,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        allowed, disallowed = self._choices(allowed_special, disallowed_special)
        if not self._is_native:
            return [self._encode_pieces(t, allowed, disallowed) for t in text]
        return self._native.encode_batch(text, allowed, disallowed, _threads(num_threads))

    def encode_ordinary_batch(
        self, text: Sequence[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """`encode_ordinary` of each text, in parallel."""
        return self.encode_batch(text, num_threads=num_threads, disallowed_special=())

    def encode_batch_to_numpy(
        self,
        text: Sequence[str],
        *,
        num_threads: int | None = None,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Flat ids of all texts and their offsets: text i has ids[offsets[i]:offsets[i + 1]]."""
        allowed, disallowed = self._choices(allowed_special, disallowed_special)
        if self._is_native:
            threads = _threads(num_threads)
            return self._native.encode_batch_to_numpy(text, allowed, disallowed, threads)
        import numpy as np

        lists = [self._encode_pieces(t, allowed, disallowed) for t in text]
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return np.array([i for ids in lists for i in ids], np.uint32), offsets

    def encode_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        num_threads: int | None = None,
        separator: int | None = None,
    ) -> NDArray[np.uint32]:
        """Ids of UTF-8 files one after the other, read and encoded in parallel.

        Special tokens in the text are plain text; `separator` is an id put after every file. Raises
        DataError for a file that is not UTF-8.
        """
        if separator is not None and not self._native.has(separator):
            raise ValueError(f"separator {separator} is no id of this vocabulary")
        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        names = [os.fspath(path) for path in paths]
        if self._is_native:
            return self._native.encode_files(names, _threads(num_threads), separator)
        import numpy as np

        ids: list[int] = []
        for name in names:
            ids += self._encode_pieces(_read_text(name))
            ids += [] if separator is None else [separator]
        return np.array(ids, np.uint32)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one token, special ones included. KeyError when there is none."""
        if isinstance(text_or_bytes, str):
            if text_or_bytes in self._special_tokens:
                return self._special_tokens[text_or_bytes]
            text_or_bytes = text_or_bytes.encode()
        token = self._native.whole(text_or_bytes)
        if token is None:
            token = self._special_tokens.get(text_or_bytes.decode("utf-8", "surrogateescape"))
        if token is None:
            raise KeyError(text_or_bytes)
        return token

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that need not be UTF-8; decoding gives them back.

        What is not UTF-8 is merged together with the last piece of text before it.
        """
        try:
            return self.encode_ordinary(data.decode())
        except UnicodeDecodeError as error:
            valid = data[: error.start]
        ends = [0, *self._piece_ends(valid)]
        stable = ends[max(len(ends) - 2, 0)]
        pieces = [valid[a:b] for a, b in pairwise(ends) if b <= stable]
        return self._native.encode_pieces([*pieces, data[stable:]])

    def count(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> int:
        """How many ids a text has. Special tokens that are not allowed count as plain text."""
        allowed, _ = self._choices(allowed_special, ())
        if not self._is_native:
            return len(self._encode_pieces(text, allowed))
        return self._native.count(text, allowed)

    def truncate(self, text: str, n: int) -> str:
        """The text of its first ids, of whole characters, that itself has at most `n` ids."""
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        ids = self.encode_to_numpy(text, disallowed_special=())
        for kept in range(min(n, len(ids)), 0, -1):
            if kept == len(ids):
                return text
            start = self.decode_bytes(ids[:kept]).decode("utf-8", "ignore")
            if self.count(start) <= n:
                return start
        return ""

    # --- decoding -----------------------------------------------------------------------------

    def decode_bytes(self, tokens: Sequence[int] | NDArray[Any]) -> bytes:
        """The bytes of ids. KeyError for an unknown id, OverflowError for a negative one."""
        return self._native.decode_bytes(tokens)

    def decode(self, tokens: Sequence[int] | NDArray[Any], errors: str = "replace") -> str:
        """The text of ids; `errors` as in `bytes.decode`."""
        return self._native.decode_bytes(tokens).decode("utf-8", errors)

    def decode_batch(
        self,
        batch: Sequence[Sequence[int]],
        *,
        errors: str = "replace",
        num_threads: int | None = None,
    ) -> list[str]:
        """`decode` of each, in parallel."""
        decoded = self.decode_bytes_batch(batch, num_threads=num_threads)
        return [data.decode("utf-8", errors) for data in decoded]

    def decode_bytes_batch(
        self, batch: Sequence[Sequence[int]], *, num_threads: int | None = None
    ) -> list[bytes]:
        """`decode_bytes` of each, in parallel."""
        return self._native.decode_bytes_batch(batch, _threads(num_threads))

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one id. KeyError for an unknown one."""
        return self._native.token_bytes(token)

    def decode_tokens_bytes(self, tokens: Iterable[int]) -> list[bytes]:
        """The bytes of each id."""
        return [self._native.token_bytes(token) for token in tokens]

    def decode_with_offsets(self, tokens: Iterable[int]) -> tuple[str, list[int]]:
        """The text, and for each id the index of the first character that has bytes of it.

        Raises UnicodeDecodeError where the bytes are not UTF-8.
        """
        parts = self.decode_tokens_bytes(tokens)
        offsets = []
        characters = 0
        for part in parts:
            starts = sum(1 for byte in part if byte & 0xC0 != 0x80)
            continues = part[0] & 0xC0 == 0x80
            offsets.append(max(0, characters - continues))
            characters += starts
        return b"".join(parts).decode(), offsets

    def stream_decoder(self) -> StreamDecoder:
        """Turns ids that come one by one into text.

        >>> tok = Tokenizer.train(["x"], 256, special_tokens=())
        >>> stream = tok.stream_decoder()
        >>> [stream.push(i) for i in tok.encode("é!")], stream.flush()
        (['', 'é', '!'], '')
        """
        return StreamDecoder(self)

    # --- properties ---------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """The largest id plus one."""
        return self.max_token_value + 1

    def __len__(self) -> int:
        return self.n_vocab

    @property
    def eot_token(self) -> int:
        """The id of <|endoftext|>. KeyError when there is none."""
        return self._special_tokens[EOT]

    @cached_property
    def special_tokens_set(self) -> set[str]:
        """The special tokens."""
        return set(self._special_tokens)

    def is_special_token(self, token: int) -> bool:
        """Whether an id is that of a special token."""
        return token in self._special_tokens.values()

    def token_byte_values(self) -> list[bytes]:
        """The bytes of all tokens but special ones, sorted."""
        return sorted(self._ids_by_bytes)

    @property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        special = set(self._special_tokens.values())
        ids = (i for i in range(self.n_vocab) if i not in special and self._native.has(i))
        return {self._native.token_bytes(i): i for i in ids}

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}, {self.n_vocab:,} ids>"

    def __reduce__(self) -> tuple[Any, ...]:
        merges = None if self._ids_are_ranks else self._native.merges()
        tokens = list(self._ids_by_bytes.items())
        return _rebuild, (
            type(self),
            (self.name, self._pat_str, self._special_tokens, tokens, merges, self._whole_pieces),
        )

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write name.json for Hugging Face, name.tiktoken, or a folder.

        A folder gets tokenizer.json, vocab.json and merges.txt.

        A .tiktoken file is read back and compared before it appears. Raises ValueError where the
        format cannot hold this vocabulary.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            _write(path, self._to_tiktoken())
        elif path.suffix == ".json":
            _write(path, _to_json(self._to_hf()))
        elif path.suffix:
            raise ValueError(f"{path}: name a .json or .tiktoken file, or a folder without suffix")
        else:
            path.mkdir(parents=True, exist_ok=True)
            hf = self._to_hf()
            vocabulary = hf["model"]["vocab"] | self._special_tokens
            lines = ["#version: 0.2", *(" ".join(pair) for pair in hf["model"]["merges"])]
            _write(path / "vocab.json", _to_json(vocabulary))
            _write(path / "merges.txt", "\n".join([*lines, ""]).encode())
            _write(path / "tokenizer.json", _to_json(hf))

    def _to_tiktoken(self) -> bytes:
        lines = [
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(self._ids_by_bytes.items(), key=lambda item: item[1])
        ]
        data = b"".join(lines)
        again = _native.Bpe.from_tiktoken(data, "gpt2", [])
        if again.merges() != self._native.merges():
            raise ValueError("a .tiktoken file cannot hold this vocabulary: its ids are not ranks")
        return data

    def _to_hf(self) -> dict[str, Any]:
        characters = _byte_characters()
        text = {
            i: token.decode("latin-1").translate(characters)
            for token, i in sorted(self._ids_by_bytes.items(), key=lambda item: item[1])
        }
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        native_name = _native_name(self._pat_str)
        if native_name == "gpt2":
            splitter: dict[str, Any] = byte_level | {"use_regex": True}
        else:
            regex = _HF_PATTERNS.get(native_name, self._pat_str)
            split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
            splitter = {
                "type": "Sequence",
                "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
            }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for token, i in sorted(self._special_tokens.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": splitter,
            "post_processor": None,
            "decoder": byte_level | {"use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self._whole_pieces and not self._native.all_reachable(),
                "vocab": {token: i for i, token in text.items()},
                "merges": [[text[a], text[b]] for a, b in self._native.merges()],
            },
        }

    # --- inside -------------------------------------------------------------------------------

    def _choices(
        self, allowed: AllowedSpecial, disallowed: DisallowedSpecial
    ) -> tuple[_native._SpecialChoice, _native._SpecialChoice]:
        """The native form of the two arguments: None, True for all, or pairs of token and id."""
        if not allowed and disallowed == "all":
            return None, True
        if allowed == "all":
            allowed = self.special_tokens_set
        if disallowed == "all":
            disallowed = self.special_tokens_set - allowed
        known = [(token, i) for token, i in self._special_tokens.items() if token in allowed]
        all_allowed = len(known) == len(self._special_tokens)
        refused = [(token, 0) for token in disallowed]
        return (True if all_allowed else known), refused or None

    def _piece_ends(self, data: bytes) -> list[int]:
        if self._is_native:
            return self._native.piece_ends(data)
        text = data.decode()
        pattern = _compile(self._pat_str)
        return [len(text[: m.end()].encode()) for m in pattern.finditer(text)]

    def _encode_pieces(
        self,
        text: str,
        allowed: _native._SpecialChoice = None,
        disallowed: _native._SpecialChoice = None,
    ) -> list[int]:
        """The way of a pattern without a native splitter: cut by the `regex` package."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        everything = list(self._special_tokens.items())
        refused = everything if disallowed is True else disallowed
        if refused and (match := _any_of(token for token, _ in refused).search(text)):
            self._native.encode(match.group(), None, refused)  # raises the ValueError
        special = dict(everything if allowed is True else allowed or ())
        stretches = _any_of(special).split(text) if special else [text]
        pattern = _compile(self._pat_str)
        ids = []
        for i, stretch in enumerate(stretches):
            if i % 2:
                ids.append(special[stretch])
            else:
                pieces = [m.group().encode() for m in pattern.finditer(stretch)]
                ids += self._native.encode_pieces(pieces)
        return ids


class StreamDecoder:
    """Text of ids as they come, held back until its characters are whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.decode_single_token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps empty. KeyError for an unknown id."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is held back, unfinished characters as U+FFFD; the decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _rebuild(cls: type[Tokenizer], arguments: tuple[Any, ...]) -> Tokenizer:
    self = cls.__new__(cls)
    self._set_up(*arguments)
    return self


def _native_name(pattern: str) -> str:
    """The native splitter for a pattern, or ''."""
    return pattern if pattern in PATTERNS else _NATIVE_NAME.get(pattern, "")


@lru_cache(maxsize=32)
def _compile(pattern: str) -> Any:
    import regex

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def _any_of(tokens: Iterable[str]) -> Any:
    import regex

    return regex.compile("(" + "|".join(map(regex.escape, sorted(tokens, key=len)[::-1])) + ")")


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    return num_threads


def _physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _special_pairs(special_tokens: Mapping[str, int]) -> list[tuple[str, int]]:
    return list(special_tokens.items())


def _byte_order() -> list[int]:
    """Bytes in the order of GPT-2's ids: printable ones of Latin-1 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [b for b in range(256) if b not in printable]


@lru_cache(maxsize=1)
def _byte_characters() -> dict[int, int]:
    """Byte -> the character that GPT-2's files write for it."""
    order = _byte_order()
    return {b: b if i < 188 else 256 + i - 188 for i, b in enumerate(order)}


def _count_pieces(
    trainer: _native.Trainer, items: Iterable[str | os.PathLike[str]], pattern: str
) -> None:
    """Feed texts in batches and files to the trainer."""
    native_name = _native_name(pattern)
    for batch in _batches(items):
        if not native_name:
            counts: Counter[str] = Counter()
            for item in batch:
                text = item if isinstance(item, str) else _read_text(item)
                counts.update(m.group() for m in _compile(pattern).finditer(text))
            trainer.add_pieces([(p.encode("utf-8", "replace"), n) for p, n in counts.items()])
        elif isinstance(batch[0], str):
            trainer.add_texts(native_name, batch)
        else:
            trainer.add_files(native_name, [os.fspath(item) for item in batch])


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


def _read_text(path: str | os.PathLike[str]) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text at byte {error.start}; convert the file to UTF-8"
        ) from error


def _read_json(path: Path) -> Any:
    return json.loads(_read_text(path))


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _bytes_of(token: str) -> bytes:
    try:
        return token.translate(_character_bytes()).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"token {token!r} is not in GPT-2's byte-level alphabet") from None


@lru_cache(maxsize=1)
def _character_bytes() -> dict[int, int]:
    back = {character: b for b, character in _byte_characters().items()}
    # A character that stands for no byte must not pass as itself.
    return {c: back.get(c, 0x110000 - 1) for c in range(512)}


def _merge_pairs(merges: Iterable[Any], ids: Mapping[str, int]) -> list[tuple[int, int]]:
    pairs = []
    for number, merge in enumerate(merges, 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or parts[0] not in ids or parts[1] not in ids:
            raise ValueError(f"merge {number} is {merge!r}: expected two tokens of the vocabulary")
        pairs.append((ids[parts[0]], ids[parts[1]]))
    return pairs


def _read_gpt2_folder(
    folder: Path, pattern: str | None, special_tokens: Mapping[str, int] | None
) -> dict[str, Any]:
    def find(*names: str) -> Path:
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor {' or '.join(names)} beside a merge list"
        )

    vocabulary_path = find("vocab.json", "encoder.json")
    ids = _read_json(vocabulary_path)
    lines = _read_text(find("merges.txt", "vocab.bpe")).splitlines()
    if lines and lines[0].startswith("#version"):
        del lines[0]
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"{vocabulary_path.name} is not an object of tokens and ids")
    merges = _merge_pairs((line for line in lines if line), ids)
    texts = {i: token for token, i in ids.items()}
    if special_tokens is None:
        # What no merge makes, and is no byte, stands in the file as a special token.
        made = {texts[a] + texts[b] for a, b in merges}
        special_tokens = {t: i for t, i in ids.items() if len(t) > 1 and t not in made}
    tokens = [(_bytes_of(t), i) for t, i in ids.items() if t not in special_tokens]
    return {
        "pattern": pattern or "gpt2",
        "special_tokens": special_tokens,
        "tokens": tokens,
        "merges": merges,
        "whole_pieces": False,
    }


def _parse_hf(file: Any) -> dict[str, Any]:
    """Arguments for a Tokenizer from a tokenizer.json; ValueError for what cannot be honoured."""
    if not isinstance(file, dict) or not isinstance(file.get("model"), dict):
        raise ValueError("no tokenizer.json: it has no model")
    model = file["model"]

    def refuse(what: str) -> None:
        raise ValueError(f"this tokenizer.json has {what}, which pygpt cannot honour")

    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        refuse(f"a model of type {model.get('type')!r}")
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"{key} {model[key]!r}")
    if file.get("normalizer") is not None:
        refuse(f"a normalizer of type {file['normalizer'].get('type')!r}")
    special_tokens = {}
    for added in file.get("added_tokens") or []:
        for key in ("single_word", "lstrip", "rstrip"):
            if added.get(key):
                refuse(f"the added token {added['content']!r} with {key}")
        special_tokens[added["content"]] = added["id"]
    ids = model["vocab"]
    return {
        "pattern": _hf_pattern(file.get("pre_tokenizer"), refuse),
        "special_tokens": special_tokens,
        "tokens": [(_bytes_of(t), i) for t, i in ids.items() if t not in special_tokens],
        "merges": _merge_pairs(model.get("merges") or [], ids),
        "whole_pieces": bool(model.get("ignore_merges")),
    }


def _hf_pattern(pre_tokenizer: Any, refuse: Callable[[str], None]) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1] or {}
    if byte_level.get("type") != "ByteLevel":
        refuse("no ByteLevel pre-tokenizer")
    if byte_level.get("add_prefix_space"):
        refuse("add_prefix_space")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return "gpt2"
    split = steps[0]
    regex = split.get("pattern", {}).get("Regex")
    if (
        len(steps) != 2
        or byte_level.get("use_regex", True)
        or split.get("type") != "Split"
        or regex is None
        or split.get("behavior") != "Isolated"
        or split.get("invert")
    ):
        refuse("pre-tokenizers other than one Split by a Regex and ByteLevel")
    return str(regex)
