"""Where texts are cut before merging: the patterns that have a native splitter, and any other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

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
HF_PATTERNS = {
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": PATTERNS["o200k"],
}
_NATIVE_NAME |= {regex: name for name, regex in HF_PATTERNS.items()}


def native_name(pattern: str) -> str:
    """The native splitter for a pattern, or ''."""
    name = pattern.removesuffix("_base")
    return name if name in PATTERNS else _NATIVE_NAME.get(pattern, "")


@lru_cache(maxsize=32)
def compile_pattern(pattern: str) -> Any:
    import regex

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def any_of(tokens: Iterable[str]) -> Any:
    import regex

    return regex.compile("(" + "|".join(map(regex.escape, sorted(tokens, key=len)[::-1])) + ")")
