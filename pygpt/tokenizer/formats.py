"""Vocabulary files: .tiktoken, GPT-2's pair of files, Hugging Face's tokenizer.json."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pygpt import _native
from pygpt.errors import DataError
from pygpt.tokenizer.patterns import HF_PATTERNS, native_name

GPT2_FILES = ("vocab.json", "encoder.json", "merges.txt", "vocab.bpe")


class Contents(NamedTuple):
    """What makes a tokenizer. `merges` None is tiktoken's rule: ids are ranks.

    Else only these pairs of ids merge, in this order, and a whole piece that is a token is taken as
    it is only where `whole_pieces`.
    """

    pattern: str
    special_tokens: Mapping[str, int]
    tokens: list[tuple[bytes, int]]
    merges: list[tuple[int, int]] | None = None
    whole_pieces: bool = True


def holds_vocabulary(folder: Path) -> bool:
    """Whether `Tokenizer.from_file` has something to read in a folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *GPT2_FILES))


def byte_order() -> list[int]:
    """Bytes in the order of GPT-2's ids: printable ones of Latin-1 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [b for b in range(256) if b not in printable]


@lru_cache(maxsize=1)
def _byte_characters() -> dict[int, int]:
    """Byte -> the character that GPT-2's files write for it."""
    order = byte_order()
    return {b: b if i < 188 else 256 + i - 188 for i, b in enumerate(order)}


def read_text(path: str | os.PathLike[str]) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text at byte {error.start}; convert the file to UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def write(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def bytes_of(token: str) -> bytes:
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


def read_gpt2_folder(
    folder: Path, pattern: str | None, special_tokens: Mapping[str, int] | None
) -> Contents:
    """vocab.json or encoder.json with merges.txt or vocab.bpe."""

    def find(*names: str) -> Path:
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor {' or '.join(names)} beside a merge list"
        )

    vocabulary_path = find(*GPT2_FILES[:2])
    ids = read_json(vocabulary_path)
    lines = read_text(find(*GPT2_FILES[2:])).splitlines()
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
    tokens = [(bytes_of(t), i) for t, i in ids.items() if t not in special_tokens]
    return Contents(pattern or "gpt2", special_tokens, tokens, merges, whole_pieces=False)


def parse_hf(file: Any) -> Contents:
    """A parsed tokenizer.json; ValueError for what cannot be honoured."""
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
    return Contents(
        pattern=_hf_pattern(file.get("pre_tokenizer"), refuse),
        special_tokens=special_tokens,
        tokens=[(bytes_of(t), i) for t, i in ids.items() if t not in special_tokens],
        merges=_merge_pairs(model.get("merges") or [], ids),
        whole_pieces=bool(model.get("ignore_merges")),
    )


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


def to_tiktoken(contents: Contents) -> bytes:
    """The lines of a .tiktoken file."""
    tokens = sorted(contents.tokens, key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in tokens)


def to_hf(contents: Contents, native: _native.Bpe) -> dict[str, Any]:
    """Hugging Face's tokenizer.json."""
    characters = _byte_characters()
    text = {
        i: token.decode("latin-1").translate(characters)
        for token, i in sorted(contents.tokens, key=lambda item: item[1])
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    name = native_name(contents.pattern)
    if name == "gpt2":
        splitter: dict[str, Any] = byte_level | {"use_regex": True}
    else:
        regex = HF_PATTERNS.get(name, contents.pattern)
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
            for token, i in sorted(contents.special_tokens.items(), key=lambda item: item[1])
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
            "ignore_merges": contents.whole_pieces and not native.all_reachable(),
            "vocab": {token: i for i, token in text.items()},
            "merges": [[text[a], text[b]] for a, b in native.merges()],
        },
    }
