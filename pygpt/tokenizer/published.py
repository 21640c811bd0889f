"""The published vocabularies: where they are, their hashes, and what their files do not say."""

from __future__ import annotations

from typing import NamedTuple

from pygpt.errors import ResourceError

EOT = "<|endoftext|>"


class Published(NamedTuple):
    """A published vocabulary: where tiktoken finds it and what the file does not say."""

    path: str
    sha256: str
    pattern: str
    special_tokens: dict[str, int]


PUBLISHER = "https://openaipublic.blob.core.windows.net/"
PUBLISHED = {
    "gpt2": Published(
        "gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "gpt2",
        {EOT: 50256},
    ),
    "r50k_base": Published(
        "encodings/r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        "gpt2",
        {EOT: 50256},
    ),
    "p50k_base": Published(
        "encodings/p50k_base.tiktoken",
        "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        "gpt2",
        {EOT: 50256},
    ),
    "cl100k_base": Published(
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
    "o200k_base": Published(
        "encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "o200k",
        {EOT: 199999, "<|endofprompt|>": 200018},
    ),
}


def fetch(name: str) -> bytes:
    """The file of a published vocabulary, from tiktoken's cache or else its publisher.

    ValueError for an unknown name, ResourceError where it cannot be had.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown vocabulary {name!r}; there are {', '.join(PUBLISHED)}")
    from tiktoken.load import read_file_cached

    url = PUBLISHER + PUBLISHED[name].path
    try:
        return read_file_cached(url, PUBLISHED[name].sha256)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ResourceError(
            f"cannot get the vocabulary {name} from {url}: {error}; connect to the network "
            "once, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error
