"""Verbs about the machine: doctor."""

from __future__ import annotations

import json as json_module
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

import pygpt
from pygpt import Tokenizer, ops, reference, training
from pygpt.errors import PygptError


def doctor(*, json: bool = False) -> int:
    """Say what runs here and how, and test every native op against its slow twin.

    Example: pygpt doctor

    Args:
        json: Print one JSON object.
    """
    facts = _facts()
    if not json:
        for name, value in facts.items():
            print(f"{name:24} {value}")
    results: dict[str, str] = {}
    for name, check in CHECKS.items():
        began = time.perf_counter()
        try:
            said = check()
        except Exception as error:
            results[name] = f"FAILED: {error}"
        else:
            results[name] = f"ok, {said} ({time.perf_counter() - began:.1f} s)"
        if not json:
            print(f"{name:24} {results[name]}")
    if json:
        print(json_module.dumps({**facts, "checks": results}))
    failed = [name for name, result in results.items() if result.startswith("FAILED")]
    if failed:
        raise PygptError(
            f"wrong results from {', '.join(failed)}; rebuild with `pip install .`, or run with "
            f"PYGPT_ISA=scalar and report it"
        )
    return 0


def _facts() -> dict[str, str]:
    native: dict[str, Any] = ops.native_info()
    device = training.choose_device("auto")
    cuda = native["cuda"]
    facts = {
        "pygpt": pygpt.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "native module": native["file"],
        "instruction set": f"{native['isa']} of {', '.join(native['available_isas'])}",
        "device": device.type,
        "CUDA kernels": cuda["why_unusable"] or f"usable on {', '.join(cuda['devices'])}",
    }
    if torch.cuda.is_available() and not cuda["built"]:
        facts["CUDA kernels"] += "; a build with CUDA adds pygpt's own attention, loss and sampling"
    for op in ("causal_attention", "linear_cross_entropy", "sample"):
        for dtype in (torch.float32, torch.bfloat16):
            backend, why = ops.chosen_backend(op, device, dtype, 64)
            facts[f"{op} {str(dtype)[6:]}"] = backend if not why else f"{backend}: {why}"
    facts["tokenizer cache"] = os.environ.get("TIKTOKEN_CACHE_DIR") or "tiktoken's default"
    facts["hub cache"] = HF_HUB_CACHE
    return facts


def _check_tokenizer() -> str:
    words = "the other weather feather gathers rather being \u6f22\u5b57 \u00e9t\u00e9"
    pieces = [f" {word}" for word in words.split() * 3]  # each is one piece of the gpt2 pattern
    tok = Tokenizer.train(pieces, 280)
    token = [tok.decode_single_token_bytes(i) for i in range(279)]
    counts = {piece.encode(): pieces.count(piece) for piece in pieces}
    _must(token == reference.bpe_train(counts, [t[0] for t in token[:256]], 23), "other merges")
    ranks = {symbol: rank for rank, symbol in enumerate(token)}
    wanted = [i for piece in pieces for i in reference.bpe_encode(ranks, piece.encode())]
    ids = tok.encode_ordinary("".join(pieces))
    _must(ids == wanted, "other ids")
    _must(tok.decode(ids) == "".join(pieces), "decoding does not give the text back")
    return f"{len(token)} tokens and {len(ids)} ids equal"


def _check_attention() -> str:
    worst = 0.0
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        generator = torch.Generator().manual_seed(1)
        q, k, v, dout = (torch.randn(2, 67, 4, 64, generator=generator).to(dtype) for _ in range(4))
        found: list[torch.Tensor] = []
        wanted: list[torch.Tensor] = []
        for impl, into in (("auto", found), ("reference", wanted)):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            out = ops.causal_attention(*inputs, impl=impl)  # type: ignore[arg-type]
            into += [out, *torch.autograd.grad(out, inputs, dout)]
        for ours, twin in zip(found, wanted, strict=True):
            ours, twin = ours.detach().double(), twin.detach().double()
            error = float((ours - twin).abs().max() / twin.abs().max())
            _must(error < bound, f"relative error {error:.1e} in {dtype}")
            worst = max(worst, error) if dtype == torch.float32 else worst
    return f"forward and backward, largest fp32 error {worst:.0e}"


def _check_loss() -> str:
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(70, 64, generator=generator), torch.randn(301, 64, generator=generator)
    targets = torch.randint(0, 301, (70,), generator=generator)
    ours = ops.linear_cross_entropy(x, weight, targets)
    twin = ops.linear_cross_entropy(x, weight, targets, impl="reference")
    error = float(abs(ours.double() - twin.double()) / twin.double())
    _must(error < 1e-5, f"relative error {error:.1e}")
    return f"error {error:.0e}"


def _check_sampling() -> str:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(32, 5003, generator=generator)
    uniforms = torch.rand(32, generator=generator)
    for settings in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}):
        ours = ops.sample(logits, uniforms=uniforms, **settings)
        twin = ops.sample(logits, uniforms=uniforms, impl="reference", **settings)
        _must(torch.equal(ours, twin), f"tokens differ from the twin's with {settings}")
    return "128 tokens equal"


def _must(holds: bool, said: str) -> None:
    if not holds:
        raise PygptError(said)


CHECKS: dict[str, Callable[[], str]] = {
    "tokenizer": _check_tokenizer,
    "causal_attention": _check_attention,
    "linear_cross_entropy": _check_loss,
    "sample": _check_sampling,
}
