"""Causal attention on the CPU: ours, torch's scaled_dot_product_attention, and the plain twin.

First each shape is checked (error against float64 at most twice torch's), then timed: rounds take
turns within one run, medians are compared. SDPA is the faster of contiguous (B, H, T, D) tensors
and transposed views of (B, T, H, D). `--quick` takes fewer rounds; `--decode` times one-query
decoding and `--grid` all lengths from 1 to 8192 and 1 to 96 heads instead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import after_reading, interleaved, machine
from torch import Tensor
from torch.nn import functional as F

from pygpt import ops, training

SHAPES = [(4, 256, 12, 64), (4, 1024, 12, 64), (1, 4096, 12, 64), (1, 2048, 16, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """The median time of each, in turns, in about `seconds` for all."""
    return interleaved(calls, seconds / len(calls))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def check(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    """Ours is as near to float64 as torch's."""

    def run(dtype: torch.dtype, impl: ops.Impl) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = ops.causal_attention(*inputs, impl=impl)
        return [out, *torch.autograd.grad(out, inputs, dout.to(dtype))]

    exact = run(torch.float64, "torch")
    for e, o, t in zip(exact, run(q.dtype, "native"), run(q.dtype, "torch"), strict=True):
        ours, torchs = (o - e).abs().max(), (t - e).abs().max()
        assert ours <= 2 * torchs + 2 * torch.finfo(q.dtype).eps * e.abs().max(), (ours, torchs)


def forward_and_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seconds: float
) -> list[tuple[float, float]]:
    """(ours, SDPA) in seconds for the forward and for the backward."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    contiguous = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    views = [x.transpose(1, 2) for x in inputs]
    flipped = dout.transpose(1, 2)

    def ours_forward() -> Tensor:
        return ops.causal_attention(q, k, v)

    def compare(ours: Callable[[], object], *layouts: Callable[[], object]) -> tuple[float, float]:
        """Calls of either layout follow one of ours, as ours follow torch's: no code is warm."""
        times = medians([call for theirs in layouts for call in (ours, theirs)], seconds)
        return statistics.mean(times[::2]), min(times[1::2])

    with torch.no_grad():
        forward = compare(
            ours_forward, partial(sdpa, *(x.detach() for x in views)), partial(sdpa, *contiguous)
        )
    graphs = [
        (ops.causal_attention(*inputs), inputs, dout),
        (sdpa(*views), inputs, flipped),
        (sdpa(*contiguous), contiguous, flipped.contiguous()),
    ]
    backward = compare(*(partial(torch.autograd.grad, *g, retain_graph=True) for g in graphs))
    return [forward, backward]


def tensors(b: int, t: int, s: int, h: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(b, n, h, d).to(dtype) for n in (t, s, s, t)]


def sweep(quick: bool) -> None:
    """Where "auto" is slowest beside torch, over what a model may ask for."""
    print("smallest ratios SDPA / ours first: B,T,S,H,D, forward and backward")
    rows = []
    for dtype in DTYPES[:2]:
        for t in (1, 2, 3, 4, 8, 16, 64, 256, 1024, 4096, 8192):
            for b, h in ((1, 1), (1, 4), (1, 12), (4, 6), (8, 12)):
                if b * h * t * t > (2e7 if quick else 3e8):
                    continue
                for s in (1, 16, 256, 1024, 4096) if t == 1 else (t,):
                    times = forward_and_backward(*tensors(b, t, s, h, 64, dtype), 0.02)
                    ratios = [theirs / ours for ours, theirs in times]
                    rows.append((min(ratios), ratios, (b, t, s, h, 64), str(dtype)[6:]))
    for _, ratios, shape, name in sorted(rows)[:30]:
        print(f"{name:9} {shape!s:22} {ratios[0]:5.2f}x {ratios[1]:5.2f}x")


def decode(seconds: float) -> None:
    """Keys and values in the caches, then in memory alone, beside a sum of as many bytes."""
    for dtype in DTYPES:
        for s in (256, 1024, 4096):
            q, k, v, _ = tensors(1, 1, s, 12, 64, dtype)
            views = [x.transpose(1, 2) for x in (q, k, v)]
            as_many = torch.ones(2 * k.nbytes // 4)
            calls = [
                partial(ops.causal_attention, q, k, v),
                partial(sdpa, *views),
                as_many.sum,
            ]
            with torch.no_grad():
                ours, theirs = medians(calls[:2], seconds)
                cold = after_reading(calls, 40)
            rates = [as_many.nbytes / cold[i] / 1e9 for i in (0, 2)]
            print(
                f"{str(dtype)[6:]:9} {s:5} keys {ours * 1e6:7.0f} {theirs * 1e6:7.0f} "
                f"{theirs / ours:6.2f}x   cold {cold[0] * 1e6:7.0f} {cold[1] * 1e6:7.0f} "
                f"{cold[1] / cold[0]:6.2f}x {rates[0]:5.0f} of {rates[1]:.0f} GB/s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--grid", action="store_true")
    options = parser.parse_args()
    seconds = 0.25 if options.quick else 1.5
    torch.manual_seed(0)
    print(machine())
    training.keep_freed_memory()  # as a training run does; fresh pages would be timed otherwise
    if options.decode:
        print(
            "one query, 12 heads of 64: us ours / SDPA, ratio; cold: 64 MB were read before a call"
        )
        decode(seconds)
        return
    if options.grid:
        sweep(options.quick)
        return
    print(f"{'':9} {'B,T,H,D':20} {'forward GF/s':>21} {'':6} {'backward GF/s':>21}")
    for dtype in DTYPES:
        for b, t, h, d in SHAPES:
            check(*tensors(1, min(t, 300), min(t, 300), 2, d, dtype))
            times = forward_and_backward(*tensors(b, t, t, h, d, dtype), seconds)
            row = f"{str(dtype)[6:]:9} {(b, t, h, d)!s:20}"
            for (ours, theirs), flops in zip(times, (4, 10), strict=True):
                work = flops * b * h * t * (t + 1) / 2 * d / 1e9
                row += f" {work / ours:9.0f} /{work / theirs:5.0f} {theirs / ours:6.2f}x"
            print(row, flush=True)
    q, k, v, _ = tensors(1, 256, 256, 4, 64, torch.float32)
    ours, plain = medians(
        [
            partial(ops.causal_attention, q, k, v),
            partial(ops.causal_attention, q, k, v, impl="reference"),
        ],
        seconds,
    )
    print(f"\nthe plain twin in Python (float64), (1, 256, 4, 64): {plain / ours:.0f}x slower")


if __name__ == "__main__":
    main()
