"""Sampling: one token per row of logits, the same on every backend."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygpt import _native, reference
from pygpt.ops.dispatch import Impl, auto_takes, resolve, takes_native, why_no_kernel
from pygpt.ops.native import DTYPES, address, launch, register, rows, watched


class Sampled(NamedTuple):
    """Tokens with what the model alone (before bias, penalties and temperature) thought of them."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32, of the tokens
    top_tokens: Tensor  # (B, n_logprobs) int64, most likely first
    top_logprobs: Tensor  # (B, n_logprobs) float32


# In the order of csrc/cpu/kernels.h's SampleParameters.
_RANGES = {
    "temperature": (0.0, 3e38),
    "top_k": (0, 2**31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-30, 1e30),
    "presence_penalty": (-1e30, 1e30),
    "frequency_penalty": (-1e30, 1e30),
}


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    logit_bias: Tensor | None = None,
    history: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    n_logprobs: int = 0,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    impl: Impl = "auto",
) -> Any:
    """Draw one token per row of logits (B, V), float32, bfloat16 or float16; returns (B,) int64.

    Each parameter is a number or a (B,) tensor. In order: `logit_bias`, (V,) or (B, V), is added;
    tokens in `history`, (B, L) int64 where negative entries are padding, have positive logits
    divided and others multiplied by `repetition_penalty`, then lose `presence_penalty` plus
    `frequency_penalty` times their count; division by `temperature` (0 takes the greatest logit);
    the `top_k` greatest stay (0: all); of these the fewest whose probability reaches `top_p`; of
    these all at least `min_p` times as likely as the likeliest. Ties go to the lowest index.

    `uniforms`, (B,) in [0, 1), by default drawn from `generator`, decides by inverse transform in
    index order. With `n_logprobs` the result is a `Sampled`. A row with NaN, +inf or no finite
    logit is a ValueError on the CPU and token -1 on a GPU.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0)
    tensor([1])
    """
    if logits.dim() != 2 or not 0 < logits.shape[1] <= 2**22:
        raise ValueError(
            f"logits must be (B, V) with 1 <= V <= {2**22}, got shape {tuple(logits.shape)}"
        )
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    rows, vocab = logits.shape
    on_cpu = logits.is_cpu
    straight = on_cpu and takes_native(impl)
    native = straight or not why_no_kernel(logits.device, logits.dtype)
    auto = straight or auto_takes("sample", logits.device, logits.dtype)
    chosen = resolve(impl, native=native, auto=auto)
    penalties = repetition_penalty, presence_penalty, frequency_penalty
    place = "cpu" if chosen == "native" else logits.device  # a kernel takes numbers with its launch
    parameters = _parameters(logits, (temperature, top_k, top_p, min_p, *penalties), place)
    if uniforms is None:
        uniforms = torch.rand(rows, dtype=torch.float64, device=logits.device, generator=generator)
    elif uniforms.shape != (rows,):
        raise ValueError(f"uniforms must be of shape ({rows},), got {tuple(uniforms.shape)}")
    uniforms = uniforms.to(torch.float64)
    if logit_bias is not None:
        if logit_bias.shape not in ((vocab,), (rows, vocab)):
            raise ValueError(
                f"logit_bias must be of shape ({vocab},) or ({rows}, {vocab}), "
                f"got {tuple(logit_bias.shape)}"
            )
        logit_bias = logit_bias.to(logits.device, torch.float32).expand(rows, vocab)
    if history is not None:
        if history.dim() != 2 or history.shape[0] != rows or history.is_floating_point():
            raise ValueError(
                f"history must be integers of shape ({rows}, L), got {history.dtype} "
                f"{tuple(history.shape)}"
            )
        history = history.to(logits.device, torch.int64)
        looked_at = on_cpu and history.numel() > 0 and not torch.compiler.is_compiling()
        if looked_at and int(history.max()) >= vocab:
            raise ValueError(
                f"history holds token {int(history.max())}, outside a vocabulary of {vocab}"
            )
    inputs = (logits.detach(), uniforms, parameters, logit_bias, history)
    match chosen:
        case "native":
            tokens = _cpu_tokens(*inputs) if straight else _sample(*inputs)
        case "torch":
            tokens = sample_torch(*inputs)
            if on_cpu and bool((tokens < 0).any()):
                raise ValueError(
                    f"row {int((tokens < 0).long().argmax())} of logits has NaN, +inf or no "
                    f"finite value; look at the model that made it"
                )
        case _:
            tokens = reference.sample(*inputs)
    if not n_logprobs:
        return tokens
    logprobs = logits.detach().float().log_softmax(1)
    top = logprobs.topk(min(n_logprobs, vocab))
    drawn = logprobs.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
    return Sampled(tokens, drawn, top.indices, top.values)


def _parameters(
    logits: Tensor, values: tuple[float | Tensor, ...], place: torch.device | str
) -> Tensor:
    """The parameters as float64: (1, 7) in `place`, or (B, 7) beside the logits for tensors."""
    rows = logits.shape[0]
    if not any(isinstance(value, Tensor) for value in values):
        make = _numbers.__wrapped__ if watched() else _numbers
        return make(values, place)
    for name, value in zip(_RANGES, values, strict=True):
        if not isinstance(value, Tensor):
            _check_range(name, value)
        elif value.shape not in ((), (rows,)):
            raise ValueError(
                f"{name} must be a number or of shape ({rows},), got {tuple(value.shape)}"
            )
        elif value.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(name, value)
    columns = [
        value.to(logits.device, torch.float64).expand(rows)
        if isinstance(value, Tensor)
        else torch.full((rows,), value, dtype=torch.float64, device=logits.device)
        for value in values
    ]
    return torch.stack(columns, 1)


@functools.lru_cache(64)  # a text's tokens are all drawn with the same
def _numbers(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    for name, value in zip(_RANGES, values, strict=True):
        _check_range(name, value)
    return torch.tensor([values], dtype=torch.float64, device=device)


def _check_range(name: str, value: float | Tensor) -> None:
    low, high = _RANGES[name]
    fine = (value >= low) & (value <= high)
    if not (fine if isinstance(fine, bool) else bool(fine.all())):
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def _cpu_tokens(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    return _native.sample(
        rows(logits),
        parameters,
        uniforms.contiguous(),
        None if logit_bias is None else rows(logit_bias),
        None if history is None else history.contiguous(),
    )


def _cuda_tokens(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    n, vocab = logits.shape
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    if not n:
        return tokens
    logits, uniforms = rows(logits), uniforms.contiguous()
    logit_bias = None if logit_bias is None else rows(logit_bias)
    history = None if history is None else history.contiguous()
    keys = torch.empty((n, vocab), dtype=torch.int32, device=logits.device)
    _native.cuda_sample(
        launch(logits),
        logits.data_ptr(),
        DTYPES[logits.dtype],
        n,
        vocab,
        logits.stride(0),
        parameters.data_ptr(),
        int(parameters.shape[0] > 1),
        uniforms.data_ptr(),
        address(logit_bias),
        0 if logit_bias is None else logit_bias.stride(0),
        address(history),
        0 if history is None else history.shape[1],
        tokens.data_ptr(),
        keys.data_ptr(),
        parameters.is_cpu,
    )
    return tokens


def _fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_sample = register(
    "sample(Tensor logits, Tensor uniforms, Tensor parameters, Tensor? logit_bias, "
    "Tensor? history) -> Tensor",
    _fake,
    cpu=_cpu_tokens,
    cuda=_cuda_tokens,
)


def sample_torch(
    logits: Tensor,
    uniforms: Tensor,
    parameters: Tensor,
    logit_bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    """The same tokens from torch's ops, by sorting; never waits for the device."""
    rows, vocab = logits.shape
    temperature, top_k, top_p, min_p, *penalties = parameters.expand(rows, -1)[..., None].unbind(1)
    z = logits.float()
    if logit_bias is not None:
        z = z + logit_bias
    if history is not None:
        repetition, presence, frequency = (x.float() for x in penalties)
        counts = z.new_zeros(rows, vocab + 1)
        counts.scatter_add_(1, history.where(history >= 0, vocab), z.new_ones(history.shape))
        counts = counts[:, :vocab]
        penalised = torch.where(z > 0, z / repetition, z * repetition)
        z = torch.where(counts > 0, penalised - (presence + frequency * counts), z)
    ranked, order = torch.sort(z + 0.0, dim=1, descending=True, stable=True)
    greatest = ranked[:, :1]
    bad = ~(z.amax(1).isfinite())  # amax gives NaN where there is one
    # The integer weights, operation by operation those of csrc/cpu/sample.cpp.
    scale = torch.full_like(greatest, reference.LOG2_E) / temperature.float()
    u = (greatest - ranked) * scale.clamp(max=torch.finfo(torch.float32).max)
    u = torch.where(u < 48.0, u, 48.0)
    whole = u.to(torch.int64)
    f = u - whole.float()
    p = torch.full_like(f, reference.EXP2_COEFFICIENTS[0])
    for coefficient in reference.EXP2_COEFFICIENTS[1:]:
        p = p * f
        p = p + coefficient
    weights = ((p * 2.0**24).to(torch.int64) << 16) >> whole
    rank = torch.arange(vocab, device=z.device)
    weights = torch.where((top_k < 1) | (rank < top_k.floor()), weights, 0)
    running = weights.cumsum(1)
    need = (top_p * running[:, -1:].double()).ceil().to(torch.int64).clamp(min=1)
    survives = (running - weights < need) & (weights >= (min_p * 2.0**40).ceil().to(torch.int64))
    weights = torch.where(survives, weights, 0)
    running = torch.zeros_like(weights).scatter_(1, order, weights).cumsum(1)
    total = running[:, -1:]
    rest = (uniforms[:, None] * total.double()).to(torch.int64).clamp(min=0)
    tokens = (running <= torch.minimum(rest, total - 1)).sum(1)
    tokens = torch.where(temperature[:, 0] == 0, order[:, 0], tokens)
    return torch.where(bad, -1, tokens)
