"""Matrix products: `linear`, and the product that other ops share."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native
from pygpt.ops.derivative import once
from pygpt.ops.dispatch import Impl, resolve
from pygpt.ops.native import DTYPES, Op, empty, register, watched

# A training step of fewer rows is left to torch: packing the weights costs as much as the product.
FEW_ROWS = 64
_NO_PACKING = 16  # rows up to which nothing is packed: kFewRows of csrc/cpu/few_rows.h
_SLICE = 1 << 21  # elements of a narrow gradient that are made at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """x weight^T + bias: F.linear, through an own product where that beats torch's.

    x (..., C), weight (V, C), bias (V,); returns (..., V). "auto" takes native kernels where
    a measurement of under a tenth of a second, made once for each kind, says that they win.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    if impl == "auto" and x.device.type != "cpu":
        return F.linear(x, weight, bias)  # in `backend("native")` too: there is no other
    dtype = autocast_dtype(x)
    native = fits_linear(x, weight, bias, dtype)
    if resolve(impl, native=native, auto=native and _linear_wins(x, weight, dtype)) != "native":
        return F.linear(x, weight, bias)
    x = x.to(dtype)
    out = None
    if _has_few_rows(x) and not torch.is_grad_enabled() and not watched():
        out = _native.linear_of_few_rows(x, weight, bias)
    return _linear(x, weight, bias) if out is None else out


def _has_few_rows(x: Tensor) -> bool:
    return x.numel() <= _NO_PACKING * x.shape[-1]


def _linear_wins(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    half, learns = dtype != torch.float32, torch.is_grad_enabled()
    if _has_few_rows(x):
        how = _how(x.numel() // x.shape[-1], weight.stride(1))
        return not learns and weight.dtype == dtype and own_wins(dtype, how)
    if x.numel() < FEW_ROWS * x.shape[-1]:
        return False
    return (half and learns) or own_wins(dtype, "alone" if half else "")


def fits_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the native product takes these; torch says what is wrong with others."""
    return (
        x.is_cpu
        and weight.is_cpu
        and dtype in DTYPES
        and weight.dtype in (dtype, torch.float32)
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and weight.numel() > 0
        and (bias is None or (bias.is_cpu and bias.shape == weight.shape[:1]))
    )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's within it."""
    device = "cpu" if x.is_cpu else x.device.type
    inside = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if inside else x.dtype


def gemm(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    """out = a b + bias, or out += a b: float32 or bfloat16 each, in bfloat16 if a or b is."""
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    bias = None if bias is None else bias.float().contiguous()
    _native.gemm(a, b, out, bias, accumulate)


# Known ratios of the times, between which the choice is the same every time: in float32 0.46 to
# 0.97 (AMD: Zen 5, and Zen 4 with AVX2 or AVX-512); in bfloat16 0.75 to 1.0 where the CPU
# multiplies it (no AMX), above 2 with AMX, under 0.4 where it does not; of few rows 0.24 to 0.65.
_MOST = {
    "float32": 1.0,
    "bfloat16": 1.4,
    "bfloat16 alone": 0.6,
    "float32 few rows": 0.8,
    "bfloat16 few rows": 0.8,
}
_own_wins: dict[str, bool] = {}  # changed by the three functions below alone


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def own_wins(dtype: torch.dtype, how: str = "") -> bool:
    """Whether the native product is taken on this machine, measured once a process: in float32, of
    bfloat16 with float32 or ("alone") without, or of "few rows"."""
    kind = f"{str(dtype).removeprefix('torch.')} {how}".rstrip()
    if kind not in _own_wins:
        _own_wins[kind] = kind in _MOST and _ratio(kind, dtype) < _MOST[kind]
    return _own_wins[kind]


def own_products() -> dict[str, bool]:
    """What was measured so far, for `assume_own_products`."""
    return dict(_own_wins)


def assume_own_products(wins: dict[str, bool]) -> None:
    """Go on with what another process measured: the two products' last bits differ."""
    _own_wins.update(wins)


def _ratio(kind: str, dtype: torch.dtype) -> float:
    """One thread's time, which does not depend on what else the machine does, over torch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            rows = 2 if kind.endswith("few rows") else 384
            a, out = torch.ones(rows, 512, dtype=dtype), torch.empty(rows, 512, dtype=dtype)
            b = torch.ones(512, 512, dtype=torch.float32 if kind == "bfloat16" else dtype)
            times: list[list[float]] = [[], []]
            for _ in range(15):
                if sum(times[1]) > 0.1:  # torch is very slow
                    break
                for product, record in zip((gemm, _torch_product), times, strict=True):
                    start = time.thread_time()
                    product(a, b.t(), out)
                    record.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times[0]) / min(times[1])


def _torch_product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    narrow = b.dtype if a.dtype == torch.float32 else a.dtype
    a, b = cast(a, narrow), cast(b, narrow)
    if out.dtype != narrow:
        slices = 1 if a.is_cuda else -(-out.numel() // _SLICE) or 1  # a CPU can cache one
        rows = -(-len(out) // slices) or 1
        part = empty(a, (min(rows, len(out)), out.shape[1]))
        for low in range(0, len(out), rows):
            piece = out[low : low + rows]
            some = torch.mm(a[low : low + rows], b, out=part[: len(piece)])
            piece.add_(some) if accumulate else piece.copy_(some)
    elif bias is not None:
        torch.addmm(bias.to(narrow), a, b, out=out)
    else:
        out.addmm_(a, b, beta=float(accumulate))


def reads_wider(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `product` in a dtype takes float32 operands as they are, without a narrow copy."""
    return device.type == "cpu" and own_wins(dtype)


def product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    """out = a b + bias, or out += a b without a bias, by whichever is faster.

    The product is made in the narrower dtype of a and b, with float32 sums; out has either.
    """
    narrow = b.dtype if a.dtype == torch.float32 else a.dtype
    # Where all are bfloat16 torch wins on CPUs that multiply it, but for the transposed a of a
    # weight's gradient.
    wide = torch.float32 in (a.dtype, b.dtype, out.dtype) or a.stride(1) != 1
    how = "" if wide else "alone" if accumulate else _how(len(a), b.stride(0))
    own = out.is_cpu and own_wins(narrow, how)
    (gemm if own else _torch_product)(a, b, out, bias, accumulate)


def _how(rows: int, k_stride: int) -> str:
    """The kind of product, for `own_wins`, of some rows and b (K, N) in one dtype."""
    # Where b's lines run along N (gradients, and weights as GPT-2's files keep them) the kernel for
    # few rows adds up multiples of lines, which takes as much for each row.
    few = _NO_PACKING if k_stride == 1 else 4
    return "few rows" if rows <= few else "alone"


def _own_product(a: Tensor, b: Tensor, out: Tensor, *rest: Any, **options: Any) -> None:
    """In float32 it has been chosen; in others `product` chooses for each."""
    chosen = a.dtype == b.dtype == out.dtype == torch.float32
    (gemm if chosen else product)(a, b, out, *rest, **options)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), in kept memory."""
    return x if x.dtype == dtype else empty(x, x.shape, dtype).copy_(x)


def linear_native(
    multiply: Callable[..., None], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The product is made in x's dtype; of a wider weight nothing narrow outlives it."""
    out = linear_fake(x, weight, bias)
    multiply(x.reshape(-1, x.shape[-1]), weight.t(), out.view(-1, weight.shape[0]), bias)
    return out


def linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return empty(x, (*x.shape[:-1], weight.shape[0]))


def linear_gradients(
    multiply: Callable[..., None], grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed ones among the gradients of x, weight and bias."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dx, dweight, dbias = empty_gradients(x, weight, needed)
    # forward: out = x weight^T + bias
    if needed[0]:
        multiply(grads, weight, dx.view(rows.shape))
    if needed[1]:
        multiply(grads.t(), rows, dweight) if len(rows) else dweight.zero_()
    if needed[2]:
        dbias.copy_(grads.sum(0))
    return dx, dweight, dbias


def empty_gradients(x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the needed ones among the gradients of x, weight and bias (else empty tensors)."""
    return (
        empty(x, x.shape if needed[0] else (0,)),
        empty(weight, weight.shape if needed[1] else (0,)),
        empty(weight, weight.shape[:1] if needed[2] else (0,)),
    )


def linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def linear_backward(
    backward: Callable[..., Any], ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    needed = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    gradients = backward(grad, *ctx.saved_tensors, needed)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


def register_linear(name: str, forward: Callable[..., Any], gradients: Callable[..., Any]) -> Op:
    """Make an op with the arguments and derivative of `linear`, and its backward op."""
    backward = register(
        f"{name}_backward(Tensor grad, Tensor x, Tensor weight, bool[] needed) "
        "-> (Tensor, Tensor, Tensor)",
        lambda grad, *inputs: empty_gradients(*inputs),
        cpu=gradients,
    )
    return register(
        f"{name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        linear_fake,
        cpu=forward,
        save=linear_save,
        backward=once(functools.partial(linear_backward, backward)),
    )


_linear = register_linear(
    "linear",
    functools.partial(linear_native, _own_product),
    functools.partial(linear_gradients, _own_product),
)
