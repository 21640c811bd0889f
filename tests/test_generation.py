"""Generation: alone or in a batch, cached or not, the same seed gives the same tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pygpt import GPT, GPTConfig, PygptError, generate, stream

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 33], [1], [7, 7, 7, 7, 2, 60, 4, 8, 12], [3, 1, 4, 1, 5]]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("new", [1, 12, 40])  # 40 is beyond the context of 24
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(
    tiny_model: GPT, sampling: dict[str, Any], new: int
) -> None:
    seeds = [3, 4, 5, 3]
    batch = generate(tiny_model, PROMPTS, max_new_tokens=new, seeds=seeds, **sampling)
    for prompt, seed, got in zip(PROMPTS, seeds, batch, strict=True):
        assert got[: len(prompt)] == prompt and len(got) == len(prompt) + new
        assert got == generate(tiny_model, prompt, max_new_tokens=new, seed=seed, **sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("length", [1, 23, 24, 25, 60])
def test_cached_equals_uncached_within_and_beyond_the_context(
    tiny_model: GPT, sampling: dict[str, Any], length: int
) -> None:
    prompts = [[i % 61 for i in range(length)], [50, 51]]
    both = [
        generate(tiny_model, prompts, max_new_tokens=50, seeds=[1, 2], cache=cache, **sampling)
        for cache in (True, False)
    ]
    assert both[0] == both[1]


def test_greedy_is_the_books_loop_within_the_context(tiny_model: GPT) -> None:
    ids = [5, 9, 33]
    for _ in range(21):
        ids.append(int(tiny_model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(tiny_model, [5, 9, 33], max_new_tokens=21, temperature=0.0) == ids


def test_beyond_the_context_the_last_half_is_kept(tiny_model: GPT) -> None:
    ids, window = list(range(30)), list(range(6, 30))
    for _ in range(30):
        token = int(tiny_model(torch.tensor([window]))[0, -1].argmax())
        ids.append(token)
        window.append(token)
        if len(window) > 24:
            window = window[-12:]
    assert generate(tiny_model, list(range(30)), max_new_tokens=30, temperature=0.0) == ids


def test_a_context_of_one_token_is_enough() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, context_length=1, emb_dim=8, n_heads=2, n_layers=1))
    both = [
        generate(model, [[1, 2, 3], [4]], max_new_tokens=9, seed=1, cache=cache)
        for cache in (True, False)
    ]
    assert both[0] == both[1] and len(both[0][1]) == 10


def test_equal_seeds_give_equal_tokens_and_others_do_not(tiny_model: GPT) -> None:
    a, b, c = generate(tiny_model, [[1, 2]] * 3, max_new_tokens=20, seeds=[8, 8, 9])
    assert a == b != c
    assert generate(tiny_model, [[1, 2]] * 2, max_new_tokens=20, seed=8) == [a, a]
    torch.manual_seed(1)
    first = generate(tiny_model, [[1, 2]] * 2, max_new_tokens=20)
    torch.manual_seed(1)
    assert generate(tiny_model, [[1, 2]] * 2, max_new_tokens=20) == first
    assert first[0] != first[1]


def test_prompts_come_as_lists_or_tensors(tiny_model: GPT) -> None:
    one = generate(tiny_model, [1, 2], max_new_tokens=3, seed=0)
    assert all(type(i) is int for i in one)
    assert generate(tiny_model, torch.tensor([1, 2]), max_new_tokens=3, seed=0) == one
    assert generate(tiny_model, torch.tensor([[1, 2]]), max_new_tokens=3, seed=0) == [one]
    assert generate(tiny_model, [torch.tensor([1, 2])], max_new_tokens=3, seed=0) == [one]
    assert generate(tiny_model, [1, 2], 0) == [1, 2]


def test_a_continuation_ends_before_its_stop_ids_and_leaves_the_others_going(
    tiny_model: GPT,
) -> None:
    free = generate(tiny_model, PROMPTS, max_new_tokens=15, seed=2)
    new = [ids[len(prompt) :] for prompt, ids in zip(PROMPTS, free, strict=True)]
    eos, other = new[0][4], new[2][2]
    stopped = generate(tiny_model, PROMPTS, max_new_tokens=15, seed=2, eos_id=eos, stop=[other])
    for prompt, ids, got in zip(PROMPTS, new, stopped, strict=True):
        ends = [i for i, token in enumerate(ids) if token in (eos, other)]
        assert got == prompt + ids[: min(ends, default=15)]
    assert {len(s) for s in stopped} != {len(s) for s in free}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_generating_and_the_mode_comes_back(
    tiny_config: GPTConfig, training: bool
) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_dict({**tiny_config.to_dict(), "drop_rate": 0.9})).train(training)
    tokens = [generate(model, [1], max_new_tokens=20, seed=0) for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert all(module.training == training for module in model.modules())


def test_the_mode_comes_back_when_a_generation_is_interrupted(
    tiny_model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    tiny_model.train()
    monkeypatch.setattr("pygpt.ops.sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model, [1, 2], max_new_tokens=5)
    assert tiny_model.training


def test_damaged_weights_are_a_numeric_error(tiny_model: GPT) -> None:
    with torch.no_grad():
        tiny_model.final_norm.weight[3] = torch.nan
    with pytest.raises(PygptError, match="logits are not finite") as caught:
        generate(tiny_model, [1, 2], max_new_tokens=5)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 61], {}, "id 61 is outside the vocabulary of 61"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        ([1], {"temperature": -1.0}, "temperature must be in"),
        ([1], {"top_p": float("nan")}, "top_p must be in"),
        ([1], {"seed": 1, "seeds": [1]}, "seed or seeds, not both"),
        ([1], {"seeds": [1, 2]}, "there are 1 prompts and 2 seeds"),
        ([1], {"seed": -1}, "seeds must be in [0, 2**64), got [-1]"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: GPT, ids: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(tiny_model, ids, **settings)


class ByteTokenizer:
    """Ids 0..60 stand for bytes of a text in UTF-8; enough of the interface for `stream`."""

    text = "abcdefghij .,!?éö漢字\n"
    alphabet = sorted(set(text.encode()))
    special_tokens_set = frozenset({"<|endoftext|>"})
    eot_token = len(alphabet)
    n_vocab = eot_token + 1

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(b) for b in text.encode()]

    def stream_decoder(self) -> Any:
        import codecs

        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        alphabet = self.alphabet

        class Stream:
            def push(self, token: int) -> str:
                return decoder.decode(bytes([alphabet[token]]))

            def flush(self) -> str:
                return decoder.decode(b"", final=True)

        return Stream()

    def decode(self, ids: list[int]) -> str:
        return bytes(self.alphabet[i] for i in ids).decode("utf-8", errors="replace")


def scripted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sampling write `text`, then end."""
    tokens: Iterator[int] = iter([*ByteTokenizer().encode(text), ByteTokenizer.eot_token])
    monkeypatch.setattr("pygpt.ops.sample", lambda logits, **settings: torch.tensor([next(tokens)]))


def test_pieces_are_whole_characters(tiny_model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted("é漢!", monkeypatch)
    pieces = list(stream(tiny_model, ByteTokenizer(), "abc"))
    assert pieces == ["é", "漢", "!"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "abcabd é."),
        ("abd", "abc"),
        (["bd", "zz", "cab"], "ab"),
        (["é."], "abcabd "),
        (["é.!"], "abcabd é."),
        ("a", ""),
    ],
)
def test_stop_strings_end_a_stream_before_them(
    tiny_model: GPT, monkeypatch: pytest.MonkeyPatch, stop: Any, expected: str
) -> None:
    scripted("abcabd é.", monkeypatch)
    pieces = list(stream(tiny_model, ByteTokenizer(), "", stop=stop))
    assert "".join(pieces) == expected and "" not in pieces


def test_a_stream_gives_the_text_that_generate_gives(tiny_config: GPTConfig) -> None:
    tok: Any = ByteTokenizer()
    torch.manual_seed(3)
    model = GPT(GPTConfig.from_dict({**tiny_config.to_dict(), "vocab_size": tok.n_vocab}))
    for seed in range(5):
        ids = generate(model, tok.encode("abc"), max_new_tokens=60, seed=seed, eos_id=tok.eot_token)
        pieces = list(stream(model, tok, "abc", max_new_tokens=60, seed=seed))
        assert "".join(pieces) == tok.decode(ids[3:])
        assert pieces == list(stream(model, tok, tok.encode("abc"), max_new_tokens=60, seed=seed))


def test_a_stream_never_meets_a_word_that_its_tokenizer_lacks(tiny_model: GPT) -> None:
    tok: Any = ByteTokenizer()
    assert tok.n_vocab < tiny_model.config.vocab_size
    assert "".join(stream(tiny_model, tok, "abc", max_new_tokens=200, temperature=5.0, seed=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_tokens_of_the_cpu(tiny_model: GPT) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "seeds": [1, 2, 3, 4], "temperature": 0.8}
    on_cpu = generate(tiny_model, PROMPTS, **settings)
    assert generate(tiny_model.cuda(), PROMPTS, **settings) == on_cpu
