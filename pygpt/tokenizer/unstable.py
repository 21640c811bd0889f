"""The end of a text whose rest is not known: bytes cut within a character, ids that may change.

As in tiktoken: a text's last piece is unstable, together with the white space before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pygpt.tokenizer.encoding import Tokenizer


def stable_part(tok: Tokenizer, text: str) -> tuple[list[int], bytes]:
    """Ids of a plain text without its unstable end, and the bytes of that end."""
    data = text.encode()
    ends = [0, *tok._piece_ends(data)]
    *pieces, last = [data[a:b] for a, b in pairwise(ends)] or [b""]
    ids = tok._native.encode_pieces(pieces)
    if last and _is_space(tok, tok._native.encode_pieces([last])[0]):
        while ids and _is_space(tok, ids[-1]):
            last = tok.decode_single_token_bytes(ids.pop()) + last
    return ids, last


def _is_space(tok: Tokenizer, token: int) -> bool:
    return not tok.decode_single_token_bytes(token).strip(b" \n\t")


def completions(tok: Tokenizer, end: bytes) -> set[tuple[int, ...]]:
    """Ids that may stand for an unstable end and what follows it, each just long enough for it."""
    if not end:
        return set()
    found: set[tuple[int, ...]] = set()
    for i in range(len(end)):
        for token in _starting_with(tok, end[i:]):
            ids: list[int] = []
            size = 0
            for token_id in (
                _ids_of(tok, end[:i] + token) if i else [tok.encode_single_token(token)]
            ):
                ids.append(token_id)
                size += len(tok.decode_single_token_bytes(token_id))
                if size >= len(end):
                    break
            found.add(tuple(ids))
    last = end.decode("utf-8", "replace")[-1:]
    before = end[: -len(last.encode())]
    # What follows may take the last blank for itself.
    if before and last.isspace() and not "\x1c" <= last <= "\x1f":
        found.add(tuple(tok._native.encode_pieces([before, last.encode()])))
    return found


def _ids_of(tok: Tokenizer, data: bytes) -> list[int]:
    try:
        return tok.encode_ordinary(data.decode())
    except UnicodeDecodeError:
        return tok._native.encode_pieces([data])


def _starting_with(tok: Tokenizer, start: bytes) -> Iterator[bytes]:
    tokens = tok._sorted_tokens
    at = bisect_left(tokens, start)
    return takewhile(lambda token: token.startswith(start), tokens[at:])
