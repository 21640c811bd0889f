"""Continuing texts: a batch of requests, one token at a time, each as if it were alone.

A request sees at most `context_length` tokens. A longer prompt is cut to its last `context_length`
tokens, and when a request has filled the context, the last half of it is encoded anew and goes on
from there. Where that happens depends on the request alone, not on its neighbours or the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from pygpt import ops
from pygpt.errors import NumericError
from pygpt.kv_cache import KVCache
from pygpt.model import GPT
from pygpt.tokenizer import EOT, Tokenizer


@overload
def generate(model: GPT, ids: Sequence[int], *args: Any, **settings: Any) -> list[int]: ...


@overload
def generate(
    model: GPT, ids: Tensor | Sequence[Sequence[int]], *args: Any, **settings: Any
) -> list[list[int]]: ...


def generate(
    model: GPT,
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    stop: Sequence[int] = (),
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    cache: bool = True,
) -> list[int] | list[list[int]]:
    """The prompt followed by its continuation: a list of ids, or one such list per prompt.

    `ids` is one prompt (a list, or a tensor of one dimension) or several (a list of lists of any
    lengths, or a (B, T) tensor). A continuation ends after `max_new_tokens`, or before `eos_id` or
    an id of `stop`. The sampling parameters are those of `ops.sample`; temperature 0 is greedy.

    `seed` is every request's own seed, `seeds` gives one for each: equal seeds and prompts give
    equal tokens, alone or in any batch. Without either, seeds are drawn from torch's generator.
    `cache` False encodes the whole window for every token. Raises ValueError on bad arguments,
    NumericError when the model's logits are not finite.
    """
    prompts, single = _as_prompts(ids)
    results = [list(prompt) for prompt in prompts]
    stop_ids = {*stop} if eos_id is None else {*stop, eos_id}
    steps = _continue(
        model,
        prompts,
        max_new_tokens,
        seeds=_as_seeds(seed, seeds, len(prompts)),
        stop_ids=stop_ids,
        cached=cache,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    for step in steps:
        for request, token in step:
            results[request].append(token)
    return results[0] if single else results


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_new_tokens: int = 100,
    *,
    eos_id: int | None = None,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    **sampling: float,
) -> Iterator[str]:
    """The continuation of a text, piece by piece, each of whole characters.

    The continuation ends as in `generate`, or before the first of the strings `stop`. `eos_id` is
    by default the tokenizer's end of text, which also begins an empty prompt. `sampling` holds
    `generate`'s sampling parameters.
    """
    specials = tokenizer.special_tokens_set
    if eos_id is None and EOT in specials:
        eos_id = tokenizer.eot_token
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids and eos_id is not None:
        ids = [eos_id]
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ValueError("a stop string must not be empty")
    steps = _continue(
        model,
        _as_prompts(ids)[0],
        max_new_tokens,
        seeds=_as_seeds(seed, None, 1),
        stop_ids=set() if eos_id is None else {eos_id},
        n_words=tokenizer.n_vocab,
        **sampling,  # type: ignore[arg-type]
    )
    decoder = tokenizer.stream_decoder()
    held = ""
    for step in steps:
        for _, token in step:
            held += decoder.push(token)
            found = [held.find(s) for s in stops if s in held]
            if found:
                if min(found):
                    yield held[: min(found)]
                return
            ready = len(held) - _length_held_back(held, stops)
            if ready:
                yield held[:ready]
                held = held[ready:]
    held += decoder.flush()
    if held:
        yield held


def _length_held_back(text: str, stops: Sequence[str]) -> int:
    """How much of the end of `text` may yet grow into one of `stops`."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


def _as_prompts(ids: Any) -> tuple[list[list[int]], bool]:
    """The prompts as lists, and whether there was only one, not in a batch."""
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    single = not ids or not isinstance(ids[0], Sequence | Tensor | np.ndarray)
    prompts = [[int(i) for i in prompt] for prompt in ([ids] if single else ids)]
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"prompt {number} is empty; begin with the tokenizer's end-of-text token"
            )
    return prompts, single


def _as_seeds(seed: int | None, seeds: Sequence[int] | None, n: int) -> list[int]:
    if seed is not None and seeds is not None:
        raise ValueError("give seed or seeds, not both")
    if seeds is None:
        seeds = torch.randint(2**62, (n,)).tolist() if seed is None else [seed] * n
    if len(seeds) != n:
        raise ValueError(f"there are {n} prompts and {len(seeds)} seeds")
    if any(not 0 <= one < 2**64 for one in seeds):
        raise ValueError(f"seeds must be in [0, 2**64), got {list(seeds)}")
    return list(seeds)


def _uniforms(seeds: Sequence[int], n: int) -> Tensor:
    """(B, n) float64 in [0, 1): token i of a request takes number i of its seed's Philox stream."""
    raw = np.stack([np.random.Philox(key=seed).random_raw(n) for seed in seeds])
    return torch.from_numpy((raw >> 11) * 2.0**-53)


@torch.inference_mode()
def _continue(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    seeds: Sequence[int],
    stop_ids: set[int],
    cached: bool = True,
    n_words: int | None = None,
    repetition_penalty: float = 1.0,
    **sampling: Any,
) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, (request, token) of every request that goes on."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if not prompts or not max_new_tokens:
        return
    limit = model.config.context_length
    device = model.tok_emb.weight.device
    sampler = device if device.type != "mps" else torch.device("cpu")  # which has no float64
    uniforms = _uniforms(seeds, max_new_tokens).to(sampler)
    histories = [list(prompt) for prompt in prompts] if repetition_penalty != 1.0 else []
    windows = [prompt[-limit:] for prompt in prompts]  # what the model sees of each active request
    active = list(range(len(prompts)))
    capacity = min(limit, max(map(len, windows)) + max_new_tokens)
    cache = KVCache(model.config, len(prompts), capacity) if cached else None
    was_training = model.training
    model.eval()
    try:
        hidden = _encode(model, windows, cache)
        for number in range(max_new_tokens):
            logits = ops.linear(hidden, model.head_weight)[:, :n_words].to(sampler)
            if histories:
                sampling["repetition_penalty"] = repetition_penalty
                sampling["history"] = _padded([histories[r] for r in active], -1, sampler)
            tokens = _sample(logits, uniforms[active, number], sampling)
            on = [row for row, token in enumerate(tokens) if token not in stop_ids]
            yield [(active[row], tokens[row]) for row in on]
            if not on or number == max_new_tokens - 1:
                return
            if len(on) < len(active):
                active = [active[row] for row in on]
                windows = [windows[row] for row in on]
                if cache is not None:
                    cache.keep(on)
            for row, request in enumerate(active):
                windows[row].append(tokens[on[row]])
                if histories:
                    histories[request].append(tokens[on[row]])
                if len(windows[row]) > limit:
                    windows[row] = windows[row][-max(1, limit // 2) :]
                    if cache is not None:
                        cache.replace(row, _cache_of(model, windows[row][:-1], capacity))
            if cache is None:
                hidden = _encode(model, windows, None)
            else:
                last = torch.tensor([window[-1:] for window in windows], device=device)
                hidden = model.hidden(last, cache)[:, 0]
    finally:
        model.train(was_training)


def _encode(model: GPT, windows: list[list[int]], cache: KVCache | None) -> Tensor:
    """The hidden state of the last token of each window, (B, C)."""
    lengths = [len(window) for window in windows]
    ids = _padded(windows, 0, model.tok_emb.weight.device)  # padding is never seen from the left
    hidden = model.hidden(ids, cache)
    if cache is not None:
        cache.trim(lengths)
    return hidden[range(len(windows)), [length - 1 for length in lengths]]


def _cache_of(model: GPT, ids: list[int], capacity: int) -> KVCache:
    cache = KVCache(model.config, 1, capacity)
    if ids:
        model.hidden(torch.tensor([ids], device=model.tok_emb.weight.device), cache)
    return cache


def _padded(rows: list[list[int]], value: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)


def _sample(logits: Tensor, uniforms: Tensor, sampling: dict[str, Any]) -> list[int]:
    try:
        tokens: list[int] = ops.sample(logits, uniforms=uniforms, **sampling).tolist()
    except ValueError:
        if logits.amax(1).isfinite().all():
            raise
        tokens = [-1]
    if -1 in tokens:
        raise NumericError(
            "the model's logits are not finite; its weights or its input are damaged"
        )
    return tokens
