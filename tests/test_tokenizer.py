"""The tokenizer against its list-based twin, tiktoken and Hugging Face's tokenizers."""

import base64
import copy
import hashlib
import http.server
import inspect
import json
import os
import pickle
import random
import resource
import string
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from pygpt import Tokenizer, reference
from pygpt.errors import DataError, ResourceError
from pygpt.tokenizer import PATTERNS, training
from pygpt.tokenizer import published as publications
from pygpt.tokenizer.formats import byte_order, to_hf

CORPUS = (
    "It was the best of times, it was the worst of times; it's what we'll say they've said.\n\n"
    "    def f(x):\n\treturn x ** 2  # 3.14159 and 1000000\r\n"
    "Ça va? 你好，世界！日本語のテキスト。 Привет, мир! नमस्ते 🙂👍🏽 ½ Ⅻ x² \u3000 \u2028 end   "
) * 3
# Characters around which the patterns change their mind.
BORDERS = [
    *"'sSdDmMtTlLvVeErRaAzZ019 \n\r\t!?/,.^",
    "'ll",
    "'VE",
    "ſ",
    "é",
    "É",
    "ǅ",
    "ʰ",
    "漢",
    "あ",
    "\u0301",
    "ि",
    "٣",
    "²",
    "Ⅻ",
    "\x00",
    "\x1c",
    "\x85",
    "\xa0",
    "\u180e",
    "\u200b",
    "\u2028",
    "\u3000",
    "\ufeff",
    "“",
    "🙂",
    "\U000e0001",
    "   ",
    "\r\n",
    "<|endoftext|>",
]


def hf_of(tok):
    return to_hf(tok._contents, tok._native)


def random_text(rng, characters=60):
    return "".join(rng.choice(BORDERS) for _ in range(rng.randrange(1, characters)))


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([CORPUS], 390)


@pytest.fixture(scope="module", params=["gpt2", "cl100k", "o200k"])
def pair(request):
    """Ours and tiktoken's of one small vocabulary."""
    trained = Tokenizer.train([CORPUS], 390, pattern=request.param)
    ranks = trained._mergeable_ranks
    special = {"<|endoftext|>": len(ranks), "<|end|>": len(ranks) + 1}
    arguments = {
        "pat_str": PATTERNS[request.param],
        "mergeable_ranks": ranks,
        "special_tokens": special,
    }
    return Tokenizer("ours", **arguments), tiktoken.Encoding("theirs", **arguments)


@pytest.fixture(scope="session")
def published(data_folder):
    """Loads a published vocabulary with ours and tiktoken from the data folder's cache."""
    cache = data_folder / "tokenizers" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("no tiktoken cache in the data folder")

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(cache.resolve()))
            return Tokenizer.from_pretrained(name), tiktoken.get_encoding(name)

    return load


# --- splitting and merging ------------------------------------------------------------


def test_every_scalar_value_splits_as_in_tiktoken(pair):
    ours, theirs = pair
    # Each character between two letters, digits, spaces and symbols shows its class.
    for start in range(0, 0x110000, 0x8000):
        codes = [c for c in range(start, start + 0x8000) if not 0xD800 <= c < 0xE000]
        text = "".join(f"a{chr(c)}A{chr(c)}{chr(c)} 1{chr(c)}!{chr(c)} \n" for c in codes)
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), hex(start)


@pytest.mark.parametrize("seed", range(4))
def test_random_border_texts_encode_as_in_tiktoken(pair, seed):
    ours, theirs = pair
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(int(os.environ.get("PYGPT_SOAK", 1)) * 1700)]
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), repr(text)
    together = "".join(texts)
    assert ours.encode_ordinary(together) == theirs.encode_ordinary(together)


def test_every_length_around_the_splitters_block_encodes_as_in_tiktoken(pair):
    # The sanitizers see a read past the end of such a text, which plain comparison need not.
    ours, theirs = pair
    text = "The quick brown fox, isn't it? " * 300
    for length in [*range(4025, 4105), *range(8120, 8200)]:
        assert ours.encode_ordinary(text[:length]) == theirs.encode_ordinary(text[:length]), length


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 128, 1000])
def test_text_at_every_offset_modulo_64(pair, length):
    ours, theirs = pair
    tail = random_text(random.Random(length), length + 1)
    for offset in range(64):
        text = "x" * offset + " " + tail
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "A漢B",
        "\u0301ABC",
        "can't's",
        "!\n//a",
        "don'ſ 'ſa 'S",
        "x\n \n  y",
        "x  \n",
        "  ",
        "\r\n\r\n a",
        "日本のNHKはABC日本Abc",
        "a\u0085b\xa0c\u180ed\u200be\u3000f\ufeff",
        "x²³ⅫⅢ",
        "\x00\x1c\x1d",
    ],
)
def test_corner_cases_encode_as_in_tiktoken(pair, text):
    ours, theirs = pair
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_pieces_encode_as_the_twin_does(tok):
    ranks = tok._mergeable_ranks
    pattern = regex.compile(PATTERNS["gpt2"])
    expected = [
        i for piece in pattern.findall(CORPUS) for i in reference.bpe_encode(ranks, piece.encode())
    ]
    assert tok.encode_ordinary(CORPUS) == expected
    assert reference.bpe_decode(ranks, expected) == CORPUS.encode()


def test_ranks_in_any_order_merge_as_in_tiktoken():
    rng = random.Random(5)
    for _ in range(60):
        words = {"".join(rng.choices("abc", k=rng.randrange(2, 7))).encode() for _ in range(30)}
        ranks = rng.sample(range(256, 400), len(words))
        vocabulary = {bytes([b]): b for b in range(256)} | dict(zip(words, ranks, strict=True))
        arguments = {
            "pat_str": PATTERNS["gpt2"],
            "mergeable_ranks": vocabulary,
            "special_tokens": {},
        }
        ours, theirs = Tokenizer("a", **arguments), tiktoken.Encoding("b", **arguments)
        for _ in range(40):
            text = " ".join("".join(rng.choices("abc", k=rng.randrange(1, 200))) for _ in range(4))
            assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), (vocabulary, text)


@pytest.mark.parametrize("unit", ["a", " ", "^", "\n", "漢", "0", "aB", "é", "\t "])
def test_long_runs_take_about_linear_time_and_are_exact(pair, unit):
    ours, theirs = pair
    text = unit * 3000
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    megabyte = unit * (1_000_000 // len(unit.encode()))
    assert ours.decode(ours.encode_ordinary(megabyte)) == megabyte


@pytest.mark.parametrize("name", ["gpt2", "r50k_base", "cl100k_base", "o200k_base"])
def test_published_vocabularies_encode_real_text_as_tiktoken_does(published, data_folder, name):
    ours, theirs = published(name)
    assert ours.n_vocab == theirs.n_vocab
    assert ours.special_tokens_set == theirs.special_tokens_set
    paths = [data_folder / "the-verdict.txt", *sorted((data_folder / "multilingual").glob("*.txt"))]
    for path in [*paths, Path(__file__)]:
        text = path.read_bytes().decode()[:200_000]
        ids = theirs.encode_ordinary(text)
        assert ours.encode_ordinary(text) == ids, path
        assert ours.decode(ids) == text
        assert ours.count(text) == len(ids)
    for token in range(ours.n_vocab):
        try:
            expected = theirs.decode_single_token_bytes(token)
        except KeyError:
            continue
        assert ours.decode_single_token_bytes(token) == expected
        assert ours.encode_single_token(expected) == token


def test_books_example(published):
    tok, _ = published("gpt2")
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace."
    ids = "15496 11 466 345 588 8887 30 220 50256 554 262 4252 18250 8812 2114 1659 617 34680"
    expected = [*map(int, ids.split()), 27271, 13]
    assert tok.encode(text, allowed_special={"<|endoftext|>"}) == expected
    assert tok.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]


# --- tiktoken's interface ----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_special_tokens_as_in_tiktoken(pair, seed):
    ours, theirs = pair
    rng = random.Random(seed)
    for _ in range(300):
        parts = [rng.choice([random_text(rng, 8), "<|endoftext|>", "<|end|>", "<|end"])]
        text = "".join(parts * rng.randrange(1, 4)) + random_text(rng, 5)
        allowed = rng.choice(["all", set(), {"<|endoftext|>"}, {"<|end|>", "<|endoftext|>"}])
        refused = rng.choice(["all", (), {"<|end|>"}, ["never"]])
        arguments = {"allowed_special": allowed, "disallowed_special": refused}
        try:
            expected = theirs.encode(text, **arguments)
        except ValueError as error:
            with pytest.raises(ValueError) as raised:
                ours.encode(text, **arguments)
            if str(raised.value) != str(error):  # tiktoken's set order decides which it names
                assert refused == "all"
        else:
            assert ours.encode(text, **arguments) == expected
            assert ours.encode_to_numpy(text, **arguments).tolist() == expected


def test_disallowed_special_token_has_tiktokens_message(pair):
    ours, theirs = pair
    with pytest.raises(ValueError) as expected:
        theirs.encode("a<|endoftext|>")
    for method in (ours.encode, ours.encode_to_numpy, lambda t: ours.encode_batch([t])):
        with pytest.raises(ValueError) as raised:
            method("a<|endoftext|>")
        assert str(raised.value) == str(expected.value)


def test_surrogates_are_repaired(pair):
    ours, theirs = pair
    for text in ["\ud83d\udc4d", "a\ud83d", "\udc4d\ud83d x", "\ud800<|end|>"]:
        expected = theirs.encode(text, disallowed_special=())
        assert ours.encode(text, disallowed_special=()) == expected
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
        assert ours.encode_to_numpy(text, disallowed_special=()).tolist() == expected
        assert ours.encode_batch([text], disallowed_special=()) == [expected]


@pytest.mark.parametrize("widest", ["\x7f", "\xff", "\uffff", "\U0010ffff"])
def test_text_of_every_width_becomes_its_utf8(tok, widest):
    # Python keeps a text in 1, 2 or 4 bytes a character; sixteen ASCII characters go at once.
    rng = random.Random(ord(widest))
    for length in range(70):
        codes = [
            rng.choice([rng.randrange(128), rng.randint(0, ord(widest))]) for _ in range(length)
        ]
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000) + widest
        assert tok.decode_bytes(tok.encode_ordinary(text)) == text.encode()
        assert tok.encode_batch([text, "a" * length + text]) == [
            tok.encode_ordinary(text),
            tok.encode_ordinary("a" * length + text),
        ]


@pytest.mark.parametrize("seed", range(3))
def test_long_text_is_converted_in_chunks_without_a_trace(pair, seed):
    # Of 65,536 characters and less: cut before a blank after a letter, or after a single newline.
    ours, theirs = pair
    rng = random.Random(seed)
    parts = [
        "word",
        " ",
        "\n",
        "\r\n",
        "слово",
        "漢",
        "。",
        "/",
        "!",
        "7",
        "'s",
        "\u0301",
        "\u3000",
        "é",
    ]
    weights = [rng.choice([0, 1, 5]) for _ in parts]
    text = "漢" + "".join(rng.choices(parts, [1, *weights[1:]], k=150_000))
    assert ours.encode(text) == theirs.encode(text)
    assert ours.count(text) == len(theirs.encode(text))
    surrogate = text + "\ud83d\udc4d" + text[:100_000]
    assert ours.encode(surrogate) == theirs.encode(surrogate)
    special = text[:65_000] + "<|end|>" * 200 + text
    assert ours.encode(special, allowed_special="all") == theirs.encode(
        special, allowed_special="all"
    )


def test_more_pieces_than_the_cache_holds_encode_alike(pair):
    ours, theirs = pair
    rng = random.Random(7)
    letters = "abcdeéßдж漢字"  # 17 MB of distinct words and their ids
    words = [" " + "".join(rng.choices(letters, k=rng.randint(5, 30))) for _ in range(180_000)]
    for part in range(0, len(words), 10_000):  # of those before, some are known and some lost
        text = "".join(words[part : part + 10_000] + rng.choices(words[: part + 1], k=3_000))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_batches_and_files_equal_single_calls_for_any_number_of_threads(pair, tmp_path):
    ours, _ = pair
    rng = random.Random(0)
    texts = ["", CORPUS, CORPUS * 200, *(random_text(rng) for _ in range(500))]
    expected = [ours.encode_ordinary(text) for text in texts]
    paths = []
    for i, text in enumerate(texts[:20]):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_bytes(text.encode())
    joined = [i for ids in expected[:20] for i in [*ids, ours.eot_token]]
    for threads in (1, 2, 5):
        assert ours.encode_ordinary_batch(texts, num_threads=threads) == expected
        ids, offsets = ours.encode_batch_to_numpy(texts, num_threads=threads, disallowed_special=())
        assert ids.dtype == np.uint32 and offsets.dtype == np.int64
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
        ids = ours.encode_files(paths, num_threads=threads, separator=ours.eot_token)
        assert ids.tolist() == joined


def test_large_file_is_cut_without_a_trace(tok, tmp_path):
    rng = random.Random(1)
    text = "".join(random_text(rng, 2000) + " word" for _ in range(800))
    assert len(text.encode()) > 1 << 20
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    assert np.array_equal(
        tok.encode_files([path]), tok.encode_to_numpy(text, disallowed_special=())
    )


def test_large_file_without_a_space_is_cut_at_its_newlines(pair, tmp_path):
    ours, theirs = pair
    rng = random.Random(2)
    lines = ["".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(60)) for _ in range(9000)]
    ends = [rng.choice(["。\n", "\n", "\r\n", "\n\n", "。\r", "7\n", "\u3000\n"]) for _ in lines]
    text = "".join(map("".join, zip(lines, ends, strict=True)))
    assert len(text.encode()) > 1 << 20
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    expected = theirs.encode_ordinary(text)
    for threads in (1, 3):
        ids = ours.encode_files([path], num_threads=threads)
        assert ids.tolist() == expected


def test_equal_ids_of_a_long_list_are_one_int(pair):
    ours, theirs = pair
    text = "the hand in the sand and the land on the other hand " * 40
    ids = ours.encode(text)
    assert ids == theirs.encode(text) and len(ids) >= 256
    token, occurrences = Counter(i for i in ids if i > 256).most_common(1)[0]
    number = next(i for i in ids if i == token)
    held = sys.getrefcount(number)
    assert held >= occurrences >= 40
    del ids
    assert sys.getrefcount(number) == held - occurrences


def test_decoding_as_in_tiktoken(pair):
    ours, theirs = pair
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(ours.n_vocab) for _ in range(rng.randrange(40))]
        assert ours.decode_bytes(ids) == theirs.decode_bytes(ids)
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode_tokens_bytes(ids) == theirs.decode_tokens_bytes(ids)
        batch = [ids, [], ids[1:]]
        for threads in (1, 2):
            assert ours.decode_batch(batch, num_threads=threads) == theirs.decode_batch(batch)
            assert ours.decode_bytes_batch(batch, num_threads=threads) == (
                theirs.decode_bytes_batch(batch)
            )
        for dtype in (np.uint32, np.int64, np.int32, np.uint16):
            assert ours.decode_bytes(np.array(ids, dtype)) == theirs.decode_bytes(ids)
        assert ours.decode_bytes(np.array(ids)[::-2]) == theirs.decode_bytes(ids[::-2])
    ids = theirs.encode_ordinary(CORPUS)
    assert ours.decode_with_offsets(ids) == theirs.decode_with_offsets(ids)


def test_bad_ids_raise_what_tiktoken_raises(pair):
    ours, theirs = pair
    for bad in ([ours.n_vocab], [0, 2**31], [-1], [2**32], [2**70]):
        with pytest.raises((KeyError, OverflowError)) as expected:
            theirs.decode_bytes(bad)
        with pytest.raises(expected.type):
            ours.decode_bytes(bad)
    with pytest.raises(KeyError, match="Invalid token for decoding: 99999"):
        ours.decode([99999])
    with pytest.raises(OverflowError):
        ours.decode(np.array([5, -1]))
    with pytest.raises(KeyError):
        ours.decode_single_token_bytes(99999)
    with pytest.raises(KeyError):
        ours.encode_single_token("no such token")
    for bad in (["a"], 5, [1.5], None):
        with pytest.raises(TypeError):
            ours.decode(bad)
    with pytest.raises(UnicodeDecodeError):
        ours.decode([ours.encode_single_token(b"\xff")], errors="strict")


def test_every_public_name_of_tiktoken_is_there_with_its_parameters():
    for name, theirs in vars(tiktoken.Encoding).items():
        if name.startswith("_"):
            continue
        ours = getattr(Tokenizer, name)
        if callable(theirs):
            ours, theirs = (inspect.signature(f).parameters for f in (ours, theirs))
            assert [(p.name, p.kind) for p in ours.values()] == [
                (p.name, p.kind) for p in theirs.values()
            ], name
            assert [p.default is p.empty for p in ours.values()] == [
                p.default is p.empty for p in theirs.values()
            ], name


def outcome(function, *arguments, **options):
    try:
        result = function(*arguments, **options)
    except Exception as error:
        return type(error), str(error) if isinstance(error, ValueError | KeyError) else ""
    return result.tolist() if isinstance(result, np.ndarray) else result


SPECIAL_CHOICES = [
    {},
    {"allowed_special": "all"},
    {"allowed_special": {"<|end|>"}},
    {"allowed_special": {"no such"}, "disallowed_special": {"<|end|>"}},
    {"disallowed_special": ()},
    {"disallowed_special": None},
    {"disallowed_special": "all"},
    {"disallowed_special": "x"},
    {"disallowed_special": ["hello"]},
    {"allowed_special": "all", "disallowed_special": "all"},
]


@pytest.mark.parametrize("text", ["hello world", "a<|end|>b", "x", "", 5, None, b"x"])
def test_any_arguments_have_tiktokens_outcome(pair, text):
    ours, theirs = pair
    for choice in SPECIAL_CHOICES:
        for name in ("encode", "encode_to_numpy"):
            expected = outcome(getattr(theirs, name), text, **choice)
            assert outcome(getattr(ours, name), text, **choice) == expected
    for name in ("encode_ordinary", "encode_single_token"):
        assert outcome(getattr(ours, name), text) == outcome(getattr(theirs, name), text)
    for name in ("decode", "decode_batch", "decode_bytes_batch"):
        assert outcome(getattr(ours, name), [text]) == outcome(getattr(theirs, name), [text]) or (
            text == ""  # an empty sequence of ids to us
        )


def test_batches_may_be_any_iterable(pair):
    ours, theirs = pair
    texts = ["one", "two <|end|>", ""]
    for make in (list, tuple, iter):
        ids = theirs.encode_batch(make(texts), disallowed_special=())
        assert ours.encode_batch(make(texts), disallowed_special=()) == ids
        assert ours.encode_ordinary_batch(make(texts)) == ids
        assert ours.encode_batch_to_numpy(make(texts), disallowed_special=())[0].size
        assert ours.decode_batch(make(ids)) == theirs.decode_batch(make(ids)) == texts


@pytest.mark.parametrize("seed", range(3))
def test_unstable_ends_as_in_tiktoken(pair, seed):
    ours, theirs = pair
    rng = random.Random(seed)
    options = {"allowed_special": {"<|end|>"}, "disallowed_special": ()}
    for _ in range(150):
        parts = [random_text(rng, 6), *rng.choices(["it was", " ", "  \n", "<|end|>", "\x1c"], k=2)]
        text = "".join(rng.sample(parts, 3))
        ids, ends = ours.encode_with_unstable(text, **options)
        expected, completions = theirs.encode_with_unstable(text, **options)
        assert ids == expected, repr(text)
        assert {*map(tuple, ends)} == {*map(tuple, completions)}, repr(text)
    with pytest.raises(ValueError, match="disallowed special token"):
        ours.encode_with_unstable("<|end|>")
    assert ours.encode_with_unstable("") == ([], [])


def test_properties_as_in_tiktoken(pair):
    ours, theirs = pair
    assert len(ours) == ours.n_vocab == theirs.n_vocab
    assert ours.max_token_value == theirs.max_token_value
    assert ours.eot_token == theirs.eot_token
    assert ours.token_byte_values() == theirs.token_byte_values()
    assert ours.is_special_token(ours.eot_token) and not ours.is_special_token(0)
    assert ours.encode_single_token("<|endoftext|>") == ours.eot_token
    assert ours.decode_single_token_bytes(ours.eot_token) == b"<|endoftext|>"


def test_bytes_that_are_not_text_round_trip(pair):
    ours, theirs = pair
    rng = random.Random(3)
    for _ in range(400):
        data = rng.choice(
            [b"", random_text(rng, 20).encode(), b" hello \n", b"  \x03"]
        ) + rng.randbytes(6)
        assert ours.decode_bytes(ours.encode_bytes(data)) == data
        assert ours._encode_bytes(data) == theirs._encode_bytes(data), data


@pytest.mark.parametrize("seed", range(3))
def test_stream_never_emits_half_a_character(tok, seed):
    rng = random.Random(seed)
    for _ in range(100):
        ids = [rng.randrange(tok.n_vocab) for _ in range(30)]
        stream = tok.stream_decoder()
        assert "".join([*map(stream.push, ids), stream.flush()]) == tok.decode(ids)
    stream = tok.stream_decoder()
    pieces = [stream.push(i) for i in tok.encode("🙂 你好")]
    assert "".join(pieces) == "🙂 你好" and "\ufffd" not in "".join(pieces)


def test_truncate_keeps_whole_characters_and_the_limit(pair):
    ours, _ = pair
    rng = random.Random(4)
    for text in [CORPUS, "🙂" * 9, "a   ", *(random_text(rng) for _ in range(100))]:
        for n in (0, 1, 3, 10, 10**6):
            start = ours.truncate(text, n)
            assert text.startswith(start) and ours.count(start) <= n
        assert ours.truncate(text, ours.count(text)) == text
    with pytest.raises(ValueError, match="negative"):
        ours.truncate("x", -1)


def test_own_pattern_goes_through_the_general_engine():
    pattern = r"\d|[^\d]+"
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b" a": 257, b"abab": 258}
    arguments = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": {"<|x|>": 300}}
    ours, theirs = Tokenizer("a", **arguments), tiktoken.Encoding("b", **arguments)
    for text in ["abab ab12ab", "<|x|>ab<|x|>", "", "é1\ud800"]:
        assert ours.encode(text, allowed_special="all") == theirs.encode(
            text, allowed_special="all"
        )
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    with pytest.raises(ValueError, match="disallowed special token"):
        ours.encode("a<|x|>")
    assert Tokenizer.train(["ab12ab"], 257, pattern=pattern, special_tokens=()).encode("ab") == [
        256
    ]
    with pytest.raises(ValueError, match="regular expression"):
        Tokenizer("bad", pat_str="(", mergeable_ranks=ranks, special_tokens={})


# --- training -------------------------------------------------------------------------


def hugging_face_merges(texts, vocab_size, min_frequency, splitter):
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(texts, trainer)
    return [list(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]]


@pytest.mark.filterwarnings("ignore:no pair occurs")
@pytest.mark.parametrize("seed", range(12))
def test_merges_equal_hugging_faces(seed, tmp_path):
    rng = random.Random(seed)
    alphabet = rng.choice(["ab", "abc ", string.printable, "aé漢 "])
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(1, 2000))) for _ in range(9)]
    vocab_size, min_frequency = rng.choice([300, 400, 900]), rng.choice([1, 2, 5])
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = hugging_face_merges(texts, vocab_size, min_frequency, splitter)
    path = tmp_path / "last.txt"
    path.write_bytes(texts[-1].encode())
    for threads in (1, 3):
        tok = Tokenizer.train(
            [*texts[:-1], path], vocab_size, min_frequency=min_frequency, num_threads=threads
        )
        assert hf_of(tok)["model"]["merges"] == expected


def test_merges_equal_hugging_faces_on_a_book(data_folder):
    text = (data_folder / "the-verdict.txt").read_text(encoding="utf-8")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = Tokenizer.train([text], 1000)
    assert hf_of(tok)["model"]["merges"] == hugging_face_merges([text], 1000, 2, splitter)


def test_training_equals_the_twin():
    pieces = Counter(p.encode() for p in regex.findall(PATTERNS["gpt2"], CORPUS))
    expected = reference.bpe_train(pieces, byte_order(), 100)
    assert list(Tokenizer.train([CORPUS], 357)._mergeable_ranks) == expected


def test_byte_tokenizer():
    tok = Tokenizer.train(["a"], 257)
    assert len(tok) == 257 and tok.eot_token == 256
    assert tok.encode("é") == [tok.encode_single_token(b"\xc3"), tok.encode_single_token(b"\xa9")]


def test_training_reports_progress_and_stops_on_request():
    seen = []
    Tokenizer.train([CORPUS], 400, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (143, 143)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train([CORPUS], 400, progress=stop)


def many_words(seed, count=20000):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(9000)]
    return [f" {rng.choice(words)}" + "y" * rng.choice([0, 0, 0, 15, 40]) for _ in range(count)]


def many_pieces(seed):
    words = many_words(seed)
    return ["".join(words[i : i + 1000]) for i in range(0, len(words), 1000)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [1, 10_000, 300_000])
@pytest.mark.parametrize("pattern", ["gpt2", r" ?\w+"])
def test_counts_beyond_the_memory_budget_go_to_disk_and_merges_stay_the_same(
    threads, budget, pattern, tmp_path, monkeypatch
):
    texts = many_pieces(budget)
    path = tmp_path / "last.txt"
    path.write_text(texts[-1])
    expected = Tokenizer.train(texts, 600, pattern=pattern)._native.merges()
    folder = tmp_path / "spill"
    monkeypatch.setenv("TMPDIR", str(folder))
    corpus = [*texts[:-1], path]
    options = {"pattern": pattern, "num_threads": threads, "memory_budget": budget}
    with pytest.raises(ResourceError, match="No such file or directory while counts of pieces"):
        Tokenizer.train(corpus, 600, **options)
    folder.mkdir()

    def watched():
        for item in corpus:
            yield item
            assert not list(folder.iterdir())  # what spills has no name, so that nothing stays

    tok = Tokenizer.train(watched(), 600, **options)
    assert tok._native.merges() == expected


def test_training_on_a_full_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"File too large while .*set TMPDIR"):
            Tokenizer.train(many_pieces(0) * 2, 300, memory_budget=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_pieces_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(training, "physical_memory", lambda: 100_000)
    with pytest.raises(ResourceError, match="distinct pieces, too many"):
        Tokenizer.train(many_pieces(0), 300)


def test_one_long_text_is_cut_among_threads_without_a_trace():
    words = [*many_words(1, 150_000), " " + "z" * 2_000_000, *many_words(2)]
    text = "".join(words)
    assert len(text) > 3 << 20
    expected = Tokenizer.train(words, 500)._native.merges()
    for threads in (1, 3):
        assert Tokenizer.train([text], 500, num_threads=threads)._native.merges() == expected


def test_training_says_when_pairs_run_out():
    with pytest.warns(UserWarning, match="instead of 1,000"):
        tok = Tokenizer.train(["abab"], 1000)
    assert tok.n_vocab < 1000


@pytest.mark.parametrize(
    "texts, size, options, message",
    [
        ([], 300, {}, "corpus is empty"),
        (["", ""], 300, {}, "corpus is empty"),
        (["a"], 255, {}, "vocab_size must be from 257"),
        (["a"], 256, {}, "vocab_size must be from 257"),
        (["a"], 10**9, {}, "vocab_size must be from 257"),
        (["a"], 300, {"min_frequency": -1}, "min_frequency"),
        (["a"], 300, {"num_threads": 0}, "num_threads"),
        (["a"], 300, {"memory_budget": 0}, "memory_budget"),
        (["a"], 300, {"special_tokens": ("x", "x")}, "distinct"),
        (["a"], 300, {"special_tokens": ("",)}, "not empty"),
        (["a"], 300, {"pattern": "("}, "regular expression"),
        ("corpus.txt", 300, {}, "text or a path"),
    ],
)
def test_bad_training_arguments(texts, size, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(texts, size, **options)


def test_bad_training_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Tokenizer.train([tmp_path / "absent.txt"], 300)
    with pytest.raises(OSError):
        Tokenizer.train([tmp_path], 300)
    (tmp_path / "binary").write_bytes(b"text\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 text at byte 4"):
        Tokenizer.train(tmp_path / "binary", 300)
    with pytest.raises(TypeError, match="int"):
        Tokenizer.train([5], 300)


# --- formats --------------------------------------------------------------------------


def same(a, b):
    texts = [CORPUS, *(random_text(random.Random(i)) for i in range(50))]
    ids = [a.encode(text, allowed_special="all") for text in texts]
    return ids == [b.encode(text, allowed_special="all") for text in texts]


def test_exports_open_in_tokenizers_and_transformers(pair, tmp_path):
    from transformers import PreTrainedTokenizerFast

    ours, _ = pair
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    fast = tokenizers.Tokenizer.from_file(str(path))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for i in range(200):
        text = random_text(random.Random(i)).replace("ſ", "s")  # its engine folds more than ours
        ids = ours.encode(text, allowed_special="all")
        assert fast.encode(text).ids == ids, repr(text)
        assert theirs(text)["input_ids"] == ids
        assert fast.decode(ids, skip_special_tokens=False) == text
    again = Tokenizer.from_file(path)
    assert same(ours, again) and again.special_tokens_set == ours.special_tokens_set


def test_files_round_trip(pair, tmp_path):
    ours, _ = pair
    ours.save(tmp_path / "name.tiktoken")
    special = {token: ours.encode_single_token(token) for token in ours.special_tokens_set}
    again = Tokenizer.from_file(
        tmp_path / "name.tiktoken", pattern=ours._pat_str, special_tokens=special
    )
    assert same(ours, again)
    ours.save(tmp_path / "folder")
    assert same(ours, Tokenizer.from_file(tmp_path / "folder"))
    (tmp_path / "folder" / "tokenizer.json").unlink()
    again = Tokenizer.from_file(tmp_path / "folder", pattern=ours._pat_str)
    assert same(ours, again)
    with pytest.raises(ValueError, match="suffix"):
        ours.save(tmp_path / "name.bin")


@pytest.mark.parametrize("seed", range(20))
def test_ranks_in_any_order_survive_an_export(seed, tmp_path):
    rng = random.Random(seed)
    words = {"".join(rng.choices("abc", k=rng.randrange(2, 7))).encode() for _ in range(30)}
    ranks = dict(zip(words, rng.sample(range(256, 400), len(words)), strict=True))
    ours = Tokenizer("x", pat_str="gpt2", mergeable_ranks=BYTES | ranks, special_tokens={})
    ours.save(tmp_path / "x.json")
    ours.save(tmp_path / "x.tiktoken")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "x.json"))
    again = Tokenizer.from_file(tmp_path / "x.json")
    lines = Tokenizer.from_file(tmp_path / "x.tiktoken", pattern="gpt2", special_tokens={})
    for _ in range(100):
        text = "".join(rng.choices("abc", k=rng.randrange(1, 200)))
        ids = ours.encode(text)
        assert ids == again.encode(text) == lines.encode(text) == theirs.encode(text).ids


def test_an_export_that_would_encode_otherwise_is_not_written(tok, tmp_path, monkeypatch):
    def damaged(*arguments):
        hf = to_hf(*arguments)
        hf["model"]["merges"].reverse()
        return hf

    monkeypatch.setattr("pygpt.tokenizer.encoding.to_hf", damaged)
    for name in ("x.json", "folder"):
        with pytest.raises(ValueError, match="cannot hold"):
            tok.save(tmp_path / name)
    monkeypatch.setattr("pygpt.tokenizer.encoding.to_tiktoken", lambda c: b"YQ== 0\n")
    with pytest.raises(ValueError):
        tok.save(tmp_path / "x.tiktoken")
    assert not list(tmp_path.iterdir())


def test_hugging_face_tokenizers_open_with_equal_ids(tmp_path):
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([CORPUS], vocab_size=400, special_tokens=["<s>", "</s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path)  # special tokens first: ids are no ranks
    for i in range(200):
        text = random_text(random.Random(i))
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids
    with pytest.raises(DataError, match="cannot honour"):
        hf = json.loads(theirs.to_str())
        hf["model"]["byte_fallback"] = True
        (tmp_path / "tokenizer.json").write_text(json.dumps(hf))
        Tokenizer.from_file(tmp_path)


def test_pickle_copy_and_threads(pair):
    ours, _ = pair
    for again in (pickle.loads(pickle.dumps(ours)), copy.copy(ours), copy.deepcopy(ours)):
        assert same(ours, again) and again.name == ours.name
    texts = [random_text(random.Random(i), 500) for i in range(200)]
    expected = [ours.encode_ordinary(text) for text in texts]
    with ThreadPoolExecutor(20) as pool:
        for _ in range(3):
            assert list(pool.map(ours.encode_ordinary, texts)) == expected


def test_fork_encodes(pair):
    ours, _ = pair
    expected = ours.encode_batch([CORPUS] * 4, num_threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if ours.encode_batch([CORPUS] * 4, num_threads=2) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


BYTES = {bytes([b]): b for b in range(256)}


@pytest.mark.parametrize(
    "ranks, special, message",
    [
        ({b"a": 0}, {}, "255 are missing"),
        (BYTES | {b"ab": 5}, {}, "given twice"),
        (BYTES | {b"": 256}, {}, "empty"),
        (BYTES | {b"ab": 2**24}, {}, "larger than"),
        (BYTES, {"x": 7}, "given twice"),
        (BYTES, {"": 256}, "empty"),
    ],
)
def test_bad_vocabularies(ranks, special, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer("bad", pat_str="gpt2", mergeable_ranks=ranks, special_tokens=special)


def test_wrong_size_of_vocabulary():
    with pytest.raises(ValueError, match="explicit_n_vocab"):
        Tokenizer("x", pat_str="gpt2", mergeable_ranks=BYTES, special_tokens={}, explicit_n_vocab=5)


def tiktoken_lines():
    import base64

    return [base64.b64encode(t) + b" %d" % i for t, i in BYTES.items()]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [*lines, b"YWI="], "line 257"),
        (lambda lines: [*lines, b"Y#I= 256"], "line 257"),
        (lambda lines: [*lines, b"YWI= x"], "line 257"),
        (lambda lines: [*lines, b"YWI= -1"], "line 257"),
        (lambda lines: [*lines, b"YWI= 99999999999999"], "line 257"),
        (lambda lines: [*lines, lines[9]], "given twice"),
        (lambda lines: lines[1:], "missing"),
        (lambda lines: [b"<html>"], "line 1"),
        (lambda lines: [], "missing"),
    ],
)
def test_damaged_tiktoken_files(tmp_path, damage, message):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"\n".join(damage(tiktoken_lines())))
    with pytest.raises(DataError, match=message):
        Tokenizer.from_file(path, pattern="gpt2", special_tokens={})


def test_tiktoken_files_with_cr_lf_blank_lines_and_gaps(tmp_path):
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"\r\n\r\n".join([*tiktoken_lines(), b"YWI= 1000"]))
    tok = Tokenizer.from_file(path, pattern="gpt2", special_tokens={})
    assert tok.encode("ab") == [1000]
    with pytest.raises(KeyError):
        tok.decode([999])
    with pytest.raises(DataError, match="give pattern= and special_tokens="):
        Tokenizer.from_file(path)


def good_hf():
    return hf_of(Tokenizer("x", pat_str="gpt2", mergeable_ranks=BYTES, special_tokens={}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda hf: hf["model"].update(dropout=0.1),
        lambda hf: hf["model"].update(type="Unigram"),
        lambda hf: hf["model"].update(end_of_word_suffix="</w>"),
        lambda hf: hf["model"].update(vocab=[]),
        lambda hf: hf["model"].update(merges=["a b c"]),
        lambda hf: hf["model"].update(merges=["a q̈"]),
        lambda hf: hf["model"].update(merges=["a b"]),
        lambda hf: hf["model"]["vocab"].update({"ab": "x"}),
        lambda hf: hf["model"]["vocab"].update({"日": 300}),
        lambda hf: hf["model"]["vocab"].update({"ab": 2}),
        lambda hf: (
            hf["model"]["vocab"].update({"ab": 300}) or hf["model"].update(merges=["a b"] * 2)
        ),
        lambda hf: hf["model"]["vocab"].pop("a"),
        lambda hf: hf.update(normalizer={"type": "NFC"}),
        lambda hf: hf.update(pre_tokenizer=None),
        lambda hf: hf.update(pre_tokenizer={"type": "Whitespace"}),
        lambda hf: hf["pre_tokenizer"].update(add_prefix_space=True),
        lambda hf: hf["pre_tokenizer"].update(use_regex=False),
        lambda hf: hf.update(added_tokens=[{"content": "<m>", "id": 300, "lstrip": True}]),
        lambda hf: hf.update(added_tokens=[{"content": "<m>", "id": 3}]),
        lambda hf: hf.update(added_tokens=[{"id": 3}]),
        lambda hf: hf.update(model=None),
    ],
)
def test_hugging_face_files_that_cannot_be_honoured(tmp_path, damage):
    hf = good_hf()
    damage(hf)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"<html>"])
def test_files_that_are_no_vocabulary(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_damaged_gpt2_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match=r"vocab\.json"):
        Tokenizer.from_file(tmp_path)


def test_unknown_pretrained_name():
    with pytest.raises(ValueError, match="gpt2, r50k_base"):
        Tokenizer.from_pretrained("gpt5")


@pytest.fixture
def publisher(tmp_path, monkeypatch):
    """A server on loopback that publishes a small p50k_base, and an empty cache."""
    data = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.content = [], data
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    known = publications.PUBLISHED["p50k_base"]
    changed = known._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(publications.PUBLISHED, "p50k_base", changed)
    monkeypatch.setattr(publications, "PUBLISHER", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_p50k_is_downloaded_once(publisher):
    for _ in range(2):
        tok = Tokenizer.from_pretrained("p50k_base")
        assert tok.decode(tok.encode("It's é")) == "It's é"
        assert tok.eot_token == 50256
    assert publisher.requests == ["/encodings/p50k_base.tiktoken"]


def test_a_download_that_is_not_what_was_published_is_refused(publisher):
    publisher.content = b"<html>please log in</html>"
    with pytest.raises(ResourceError, match="p50k_base"):
        Tokenizer.from_pretrained("p50k_base")


def test_pretrained_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("pygpt.tokenizer.published.PUBLISHER", "http://127.0.0.1:9/")
    with pytest.raises(ResourceError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.from_pretrained("gpt2")
