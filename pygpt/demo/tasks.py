"""Instructions whose answers Python computes, over words of the corpus.

A word is in one of two pools by a hash of its letters: what is tested never stood in a training
instruction. Every example is a pure function of (seed, number), so that none is seen twice.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pygpt.tokenizer import Tokenizer

HELD_OUT_PERCENT = 15
INVENTED = 0.8


class Task(NamedTuple):
    """An instruction and how its answer comes from the words."""

    instruction: str
    answer: Callable[[list[str]], str]


TASKS: tuple[Task, ...] = (
    Task("Count the words:", lambda words: str(len(words))),
    Task("Take the first word:", lambda words: words[0]),
    Task("Take the last word:", lambda words: words[-1]),
    Task("Remove the first word:", lambda words: " ".join(words[1:])),
    Task("Reverse the words:", lambda words: " ".join(reversed(words))),
    Task("Join with and:", lambda words: ", ".join(words[:-1]) + " and " + words[-1]),
    Task("Make a function name:", "_".join),
)


class Words(NamedTuple):
    """Words to train on, words held out for the test, and the pieces to invent more words from."""

    known: list[str]
    held_out: list[str]
    beginnings: list[str]
    endings: list[str]


def choose_words(words: Iterable[str], tok: Tokenizer) -> Words:
    """Those of `words` that have two pieces, the same ones after a space and an underscore.

    So every word of an answer is made of pieces that the question holds, in a function's name too.
    """

    def pieces(text: str) -> list[str]:
        ids = tok.encode_ordinary(text)
        return [tok.decode_single_token_bytes(i).decode(errors="replace") for i in ids]

    def plain(word: str) -> bool:
        spaced = pieces(" " + word)
        return len(spaced) == 2 and pieces("_" + word) == ["_", spaced[0][1:], spaced[1]]

    chosen = sorted(filter(plain, words))
    held_out = [word for word in chosen if _percent(word) < HELD_OUT_PERCENT]
    vocabulary = {tok.decode([token]) for token in range(tok.n_vocab)}
    return Words(
        sorted(set(chosen) - set(held_out)),
        held_out,
        sorted(x[1:] for x in vocabulary if re.fullmatch(" [a-z]{1,6}", x) and x[1:] in vocabulary),
        sorted(x for x in vocabulary if re.fullmatch("[a-z]{1,5}", x)),
    )


def training_examples(words: Words, count: int, seed: int) -> list[dict[str, str]]:
    """`count` examples, the tasks in turn, as the instruction room takes them.

    Four words of five are invented from two pieces: a network that cannot remember the words has
    to learn what the instruction means.
    """
    known, unseen = words.known, set(words.held_out)

    def choose(rng: random.Random, n: int) -> list[str]:
        chosen: list[str] = []
        while len(chosen) < n:
            word = rng.choice(known)
            if rng.random() < INVENTED:
                word = rng.choice(words.beginnings) + rng.choice(words.endings)
            if word not in chosen and word not in unseen and len(word) > 2:
                chosen.append(word)
        return chosen

    return [_example(number, seed, choose) for number in range(count)]


def test_examples(words: Words, count: int, seed: int) -> list[dict[str, str]]:
    """`count` examples over held-out words only, the tasks in turn."""
    return [_example(n, seed, lambda rng, k: rng.sample(words.held_out, k)) for n in range(count)]


def _example(
    number: int, seed: int, choose: Callable[[random.Random, int], list[str]]
) -> dict[str, str]:
    rng = random.Random(f"{seed} {number}")
    task = TASKS[number % len(TASKS)]
    chosen = choose(rng, rng.randint(2, 5) if task is TASKS[0] else 3)
    # The answer begins with a space, so that its words have the same tokens as in the input.
    return {
        "instruction": task.instruction,
        "input": " ".join(chosen),
        "output": " " + task.answer(chosen),
    }


def _percent(word: str) -> int:
    return int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
