"""The slow, obvious twins of the native ops: so plain that they need no test of their own.

Run by `impl="reference"`, `pygpt doctor`, the tests and the benchmarks' Python column.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# --- causal attention ---------------------------------------------------------------


def visible_keys(
    t: int,
    s: int,
    window: int | None,
    document_ids: Tensor | None,
    kv_lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees: (B, T, S), or (1, T, S) where all sequences are alike."""
    length = torch.tensor([s], device=device) if kv_lengths is None else kv_lengths.long()
    position = length[:, None] - t + torch.arange(t, device=device)  # of the queries
    key = torch.arange(s, device=device)
    seen = key <= position[..., None]
    if window is not None:
        seen = seen & (key > position[..., None] - window)
    if document_ids is not None:
        position = position.clamp(min=0).expand(len(document_ids), t)
        seen = seen & (document_ids.gather(1, position)[..., None] == document_ids[:, None])
    return seen


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    document_ids: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention by its formula in float64; arguments as in ops.causal_attention."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), keys) * scale
    seen = visible_keys(q.shape[1], k.shape[1], window, document_ids, kv_lengths, q.device)
    hidden = ~seen[:, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    if dropout_p and seed is not None:
        weights = weights * dropout_keeps(int(seed), weights.shape, dropout_p) / (1 - dropout_p)
    return torch.einsum("bhts,bshd->bthd", weights, values).to(q.dtype)


def dropout_keeps(seed: int, shape: torch.Size, p: float) -> Tensor:
    """The weights (B, H, T, S) that attention dropout keeps, as csrc/core/philox.h counts them."""
    b, h, t, s = np.indices((*shape[:3], (shape[3] + 3) // 4)).reshape(4, -1).astype(np.uint64)
    counter, low = [s, t, h, b], np.uint64(0xFFFFFFFF)
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            second >> np.uint64(32) ^ counter[1] ^ np.uint64(key[0]),
            second & low,
            first >> np.uint64(32) ^ counter[3] ^ np.uint64(key[1]),
            first & low,
        ]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    words = np.stack(counter, -1).reshape(*shape[:3], -1)[..., : shape[3]]
    return torch.from_numpy(words >= np.uint64(int(p * 2.0**32)))


# --- sampling -----------------------------------------------------------------------

LOG2_E = float.fromhex("0x1.715476p+0")
# 2^-f on [0, 1), highest power first: |error| < 2^-21.
EXP2_COEFFICIENTS = [
    float.fromhex(x)
    for x in (
        "-0x1.ef66d2p-11",
        "0x1.2da7d6p-7",
        "-0x1.c4fef8p-5",
        "0x1.ebe392p-3",
        "-0x1.62e3bcp-1",
        "0x1p0",
    )
]


def sampling_weights(z: np.ndarray, temperature: float) -> list[int]:
    """floor(2^40 exp((z - max z) / temperature)) as every backend computes it, in float32 steps."""
    with np.errstate(over="ignore"):
        scale = min(np.float32(LOG2_E) / np.float32(temperature), np.finfo(np.float32).max)
        u = np.minimum((z.max() - z) * np.float32(scale), np.float32(48.0))
    whole = u.astype(np.int64)
    f = u - whole.astype(np.float32)
    p = np.full_like(f, EXP2_COEFFICIENTS[0])
    for coefficient in EXP2_COEFFICIENTS[1:]:
        p = p * f + np.float32(coefficient)
    mantissa = (p * np.float32(2.0**24)).astype(np.int64)
    return [int(m) << 16 >> int(n) for m, n in zip(mantissa, whole, strict=True)]


def sample(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """One token per row, by sorting; arguments as in csrc/cpu/kernels.h, on the CPU."""
    tokens = []
    for row in range(logits.shape[0]):
        settings = parameters[row if len(parameters) > 1 else 0].tolist()
        temperature, top_k, top_p, min_p, *penalties = settings
        repetition, presence, frequency = (np.float32(x) for x in penalties)
        z = logits[row].float().numpy().copy()
        if logit_bias is not None:
            z += logit_bias[row].numpy()
        seen = [] if history is None else [i for i in history[row].tolist() if i >= 0]
        for i in set(seen):
            z[i] = z[i] / repetition if z[i] > 0 else z[i] * repetition
            z[i] -= presence + frequency * np.float32(seen.count(i))
        if not math.isfinite(z.max()):  # max gives NaN where there is one
            raise ValueError(
                f"row {row} of logits has NaN, +inf or no finite value; look at the model that "
                f"made it"
            )
        candidates = sorted(range(len(z)), key=lambda i: (-z[i], i))
        if temperature == 0:
            tokens.append(candidates[0])
            continue
        weights = sampling_weights(z, temperature)
        if top_k >= 1:
            candidates = candidates[: int(top_k)]
        need = max(1, math.ceil(top_p * float(sum(weights[i] for i in candidates))))
        survivors, running = [], 0
        for i in candidates:
            if running >= need:
                break
            survivors.append(i)
            running += weights[i]
        least = math.ceil(min_p * 2.0**40)
        survivors = sorted(i for i in survivors if weights[i] >= least)
        total = sum(weights[i] for i in survivors)
        rest = min(int(float(uniforms[row]) * float(total)), total - 1)
        for i in survivors:
            rest -= weights[i]
            if rest < 0:
                tokens.append(i)
                break
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


# --- cross-entropy ------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Cross-entropy in float64, row by row of the definition; differentiable."""
    counts = targets != ignore_index
    logits = logits.double()
    chosen = logits.gather(1, targets.where(counts, 0)[:, None])[:, 0]
    losses = torch.where(counts, logits.logsumexp(1) - chosen, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


# --- byte-pair encoding -------------------------------------------------------------


def merge_pair(symbols: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """Join every `left` that `right` follows, from the left."""
    merged: list[bytes] = []
    i = 0
    while i < len(symbols):
        joined = symbols[i : i + 2] == [left, right]
        merged.append(left + right if joined else symbols[i])
        i += 1 + joined
    return merged


def bpe_encode(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """Ids of one piece: merge the neighbours whose join has the lowest rank, leftmost first."""
    symbols = [bytes([byte]) for byte in piece]
    while piece not in ranks:
        joins = [(ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(symbols))]
        rank, i = min(joins, default=(math.inf, 0))
        if rank == math.inf:
            return [ranks[symbol] for symbol in symbols]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [ranks[piece]]


def bpe_decode(ranks: dict[bytes, int], ids: list[int]) -> bytes:
    """The bytes of ids."""
    token = {rank: symbol for symbol, rank in ranks.items()}
    return b"".join(token[i] for i in ids)


def bpe_train(
    pieces: dict[bytes, int], byte_order: list[int], merges: int, min_frequency: int = 2
) -> list[bytes]:
    """Tokens in order of id, from how often each piece of the corpus occurs.

    `byte_order` lists the bytes in order of id. The most frequent pair is merged first, of equals
    the one with the smallest ids.
    """
    tokens = [bytes([byte]) for byte in byte_order]
    words = [([bytes([byte]) for byte in piece], count) for piece, count in pieces.items()]
    for _ in range(merges):
        id_of = {token: i for i, token in enumerate(tokens)}
        counts: dict[tuple[bytes, bytes], int] = {}
        for symbols, count in words:
            for pair in pairwise(symbols):
                counts[pair] = counts.get(pair, 0) + count
        if not counts:
            break
        best = min(counts, key=lambda p: (-counts[p], id_of[p[0]], id_of[p[1]]))
        if counts[best] < min_frequency:
            break
        tokens.append(best[0] + best[1])
        words = [(merge_pair(symbols, *best), count) for symbols, count in words]
    return tokens
