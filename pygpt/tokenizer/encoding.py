"""The class: encoding, decoding, and where a vocabulary comes from and goes to."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pygpt import _native
from pygpt.errors import DataError
from pygpt.tokenizer.formats import (
    GPT2_FILES,
    Contents,
    byte_order,
    parse_hf,
    read_gpt2_folder,
    read_json,
    read_text,
    to_hf,
    to_json,
    to_tiktoken,
    write,
)
from pygpt.tokenizer.patterns import PATTERNS, any_of, compile_pattern, native_name
from pygpt.tokenizer.published import EOT, PUBLISHED, fetch
from pygpt.tokenizer.training import train_merges
from pygpt.tokenizer.unstable import completions, stable_part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
        contents = Contents(pat_str, special_tokens, list(mergeable_ranks.items()))
        self._finish(name, contents, _build(contents))

    def _finish(self, name: str, contents: Contents, native: _native.Bpe) -> None:
        pattern = contents.pattern
        self.name = name
        self._pat_str = PATTERNS.get(pattern.removesuffix("_base"), pattern)
        self._is_native = bool(native_name(pattern)) or not compile_pattern(pattern)
        self._special_tokens = dict(contents.special_tokens)
        self._native = native
        self._ids_are_ranks = contents.merges is None
        self._whole_pieces = contents.whole_pieces
        self.max_token_value = native.size() - 1

    @classmethod
    def _from_contents(cls, name: str, contents: Contents) -> Self:
        self = cls.__new__(cls)
        self._finish(name, contents, _build(contents))
        return self

    @property
    def _contents(self) -> Contents:
        merges = None if self._ids_are_ranks else self._native.merges()
        tokens = list(self._mergeable_ranks.items())
        return Contents(
            self._pat_str, self._special_tokens, tokens, merges, whole_pieces=self._whole_pieces
        )

    # --- where vocabularies come from ---------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """A published vocabulary, hash-checked, from tiktoken's cache or else its publisher.

        Names: gpt2, r50k_base, p50k_base, cl100k_base, o200k_base. `TIKTOKEN_CACHE_DIR` says where
        the files are kept.
        """
        return cls._from_published(name, fetch(name))

    @classmethod
    def _from_published(cls, name: str, data: bytes) -> Self:
        published = PUBLISHED[name]
        read = _native.Bpe.from_gpt2_merges if name == "gpt2" else _native.Bpe.from_tiktoken
        contents = Contents(published.pattern, published.special_tokens, [])
        self = cls.__new__(cls)
        self._finish(name, contents, read(data, published.pattern, _special_pairs(contents)))
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
        vocab.bpe; one of these four stands for both. A .tiktoken file holds neither pattern nor
        special tokens: published files are known by their hash, for others both arguments are
        needed. Templates that add special tokens (a post-processor) are not applied. Raises
        DataError for a file that cannot be honoured.
        """
        path = Path(path)
        try:
            if path.suffix == ".tiktoken" and not path.is_dir():
                return cls._from_tiktoken(path, pattern, special_tokens)
            if path.name in GPT2_FILES:
                contents = read_gpt2_folder(path.parent, pattern, special_tokens)
            elif path.is_dir() and not (path / "tokenizer.json").exists():
                contents = read_gpt2_folder(path, pattern, special_tokens)
            else:
                contents = parse_hf(read_json(path / "tokenizer.json" if path.is_dir() else path))
                if pattern is not None:
                    contents = contents._replace(pattern=pattern)
                if special_tokens is not None:
                    contents = contents._replace(special_tokens=special_tokens)
            return cls._from_contents(path.stem, contents)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path} has not the shape of a vocabulary file: {error}") from error

    @classmethod
    def _from_tiktoken(
        cls, path: Path, pattern: str | None, special_tokens: Mapping[str, int] | None
    ) -> Self:
        data = path.read_bytes()
        if pattern is None and special_tokens is None:
            digest = hashlib.sha256(data).hexdigest()
            for name, published in PUBLISHED.items():
                if digest == published.sha256:
                    return cls._from_published(name, data)
        if pattern is None or special_tokens is None:
            raise DataError(
                f"{path} holds neither pattern nor special tokens and is no published "
                "vocabulary: give pattern= and special_tokens= to Tokenizer.from_file"
            )
        contents = Contents(pattern, special_tokens, [])
        native = _native.Bpe.from_tiktoken(data, native_name(pattern), _special_pairs(contents))
        self = cls.__new__(cls)
        self._finish(path.stem, contents, native)
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
        merges = train_merges(
            texts_or_paths,
            vocab_size,
            pattern=pattern,
            special_tokens=special_tokens,
            min_frequency=min_frequency,
            num_threads=_threads(num_threads),
            progress=progress,
            memory_budget=memory_budget,
        )
        tokens = [bytes([b]) for b in byte_order()]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        specials = {token: len(tokens) + i for i, token in enumerate(special_tokens)}
        ranks = [(token, rank) for rank, token in enumerate(tokens)]
        return cls._from_contents("trained", Contents(pattern, specials, ranks))

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
        text: Iterable[str],
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
        self, text: Iterable[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """`encode_ordinary` of each text, in parallel."""
        return self.encode_batch(text, num_threads=num_threads, disallowed_special=())

    def encode_batch_to_numpy(
        self,
        text: Iterable[str],
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
            ids += self._encode_pieces(read_text(name))
            ids += [] if separator is None else [separator]
        return np.array(ids, np.uint32)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of one token, special ones included. KeyError when there is none."""
        if isinstance(text_or_bytes, str):
            if text_or_bytes in self._special_tokens:
                return self._special_tokens[text_or_bytes]
            text_or_bytes = text_or_bytes.encode()
        if not isinstance(text_or_bytes, bytes):
            name = type(text_or_bytes).__name__
            raise TypeError(f"argument 'text_or_bytes': {name!r} object is neither str nor bytes")
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
            ids, end = stable_part(self, data[: error.start].decode())
            return ids + self._native.encode_pieces([end + data[error.start :]])

    _encode_bytes = encode_bytes  # as tiktoken calls it

    def encode_with_unstable(
        self,
        text: str,
        *,
        allowed_special: AllowedSpecial = frozenset(),
        disallowed_special: DisallowedSpecial = "all",
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of a text that goes on, but for its end, and the ids that may come there.

        The end is the last piece with the white space before it. No id that stands for the end may
        be missing among the second, but the list is long for short ends.
        """
        self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        allowed = self.special_tokens_set if allowed_special == "all" else allowed_special
        special = self.special_tokens_set & set(allowed)
        start = max([m.end() for m in any_of(special).finditer(text)] if special else [], default=0)
        ids, end = stable_part(self, text[start:])
        return self.encode(text[:start], allowed_special=special, disallowed_special=()) + ids, [
            list(ids) for ids in completions(self, end)
        ]

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
        batch: Iterable[Sequence[int]],
        *,
        errors: str = "replace",
        num_threads: int | None = None,
    ) -> list[str]:
        """`decode` of each, in parallel."""
        decoded = self.decode_bytes_batch(batch, num_threads=num_threads)
        return [data.decode("utf-8", errors) for data in decoded]

    def decode_bytes_batch(
        self, batch: Iterable[Sequence[int]], *, num_threads: int | None = None
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
        return sorted(self._mergeable_ranks)

    @cached_property
    def _sorted_tokens(self) -> list[bytes]:
        return self.token_byte_values()

    @property
    def _mergeable_ranks(self) -> dict[bytes, int]:
        special = set(self._special_tokens.values())
        ids = (i for i in range(self.n_vocab) if i not in special and self._native.has(i))
        return {self._native.token_bytes(i): i for i in ids}

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}, {self.n_vocab:,} ids>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._from_contents, (self.name, self._contents)

    # --- files --------------------------------------------------------------------------------

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of Hugging Face's tokenizer.json."""
        return to_hf(self._contents, self._native)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write name.json for Hugging Face, name.tiktoken, or a folder.

        A folder gets tokenizer.json, vocab.json and merges.txt. A .tiktoken file holds neither
        pattern nor special tokens. What is written is read back first: ValueError where the format
        cannot hold this vocabulary.
        """
        path = Path(path)
        contents = self._contents
        if path.suffix == ".tiktoken":
            data = to_tiktoken(contents)
            again = _native.Bpe.from_tiktoken(data, "", [])
        elif path.suffix not in (".json", ""):
            raise ValueError(f"{path}: name a .json or .tiktoken file, or a folder without suffix")
        else:
            hf = self.to_hugging_face()
            data = to_json(hf)
            again = _build(parse_hf(json.loads(data)))
        pieces = [token for token, _ in contents.tokens]
        encodes_alike = again.encode_pieces(pieces) == self._native.encode_pieces(pieces)
        if not encodes_alike or again.merges() != self._native.merges():
            raise ValueError(f"{path}: this format cannot hold this vocabulary's merges")
        if path.suffix:
            write(path, data)
        else:
            path.mkdir(parents=True, exist_ok=True)
            lines = ["#version: 0.2", *(" ".join(pair) for pair in hf["model"]["merges"])]
            write(path / "vocab.json", to_json(hf["model"]["vocab"] | self._special_tokens))
            write(path / "merges.txt", "\n".join([*lines, ""]).encode())
            write(path / "tokenizer.json", data)

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
        refused = [(token, 0) for token in disallowed or ()]
        return (True if all_allowed else known), refused or None

    def _piece_ends(self, data: bytes) -> list[int]:
        if self._is_native:
            return self._native.piece_ends(data)
        text = data.decode()
        pattern = compile_pattern(self._pat_str)
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
        if refused and (match := any_of(token for token, _ in refused).search(text)):
            self._native.encode(match.group(), None, refused)  # raises the ValueError
        special = dict(everything if allowed is True else allowed or ())
        stretches = any_of(special).split(text) if special else [text]
        pattern = compile_pattern(self._pat_str)
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


def _build(contents: Contents) -> _native.Bpe:
    return _native.Bpe(
        contents.tokens,
        contents.merges,
        contents.whole_pieces,
        native_name(contents.pattern),
        _special_pairs(contents),
    )


def _special_pairs(contents: Contents) -> list[tuple[str, int]]:
    return list(contents.special_tokens.items())


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    return num_threads
