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
from pygpt.ops.dispatch import Impl, resolve
from pygpt.ops.native import DTYPES, address, empty, register

# Below this many rows reading the weights dominates, and torch's product is as good.
SGEMM_ROWS = 64
_SLICE = 1 << 21  # elements of a narrow gradient that are made at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """x weight^T + bias: F.linear, through an own float32 product where that beats torch's.

    x (..., C), weight (V, C), bias (V,); returns (..., V). "auto" takes the native kernel on
    machines where a measurement of a few milliseconds, made once, says that it wins.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    if impl == "auto" and x.device.type != "cpu":
        return F.linear(x, weight, bias)  # in `backend("native")` too: there is no other
    dtype = autocast_dtype(x)
    native = (
        x.device.type == "cpu"
        and dtype in DTYPES
        and weight.dtype in (dtype, torch.float32)
        and x.dim() > 0
        and x.shape[-1] == weight.shape[-1] > 0
    )
    many = native and x.numel() >= SGEMM_ROWS * x.shape[-1]
    wins = sgemm_wins() if dtype == torch.float32 else torch.is_grad_enabled()
    if resolve(impl, native=native, auto=many and wins) == "native":
        return torch.ops.pygpt.linear(x.to(dtype), weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are made: autocast's within it."""
    device = x.device.type
    inside = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if inside else x.dtype


def sgemm(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """out = a b + bias, or out += a b, in float32."""
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    bias = None if bias is None else bias.contiguous()
    _native.sgemm(
        a.shape[0],
        b.shape[1],
        a.shape[1],
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        b.data_ptr(),
        b.stride(0),
        b.stride(1),
        out.data_ptr(),
        out.stride(0),
        address(bias),
        accumulate,
    )
    return out


_sgemm_wins: bool | None = None  # changed by the two functions below alone


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def sgemm_wins() -> bool:
    """Whether the native product beats torch's on this machine: measured once a process."""
    global _sgemm_wins
    if _sgemm_wins is None:
        _sgemm_wins = _measure_sgemm()
    return _sgemm_wins


def assume_sgemm_wins(wins: bool) -> None:
    """Go on with what another process measured: the two products' last bits differ."""
    global _sgemm_wins
    _sgemm_wins = wins


def _measure_sgemm() -> bool:
    with torch.no_grad():
        a, b, out = torch.ones(384, 512), torch.ones(512, 512), torch.empty(384, 512)
        times: list[list[float]] = [[], []]
        for _ in range(7):
            for product, record in zip((sgemm, _torch_product), times, strict=True):
                start = time.perf_counter()
                product(a, b.t(), out)
                record.append(time.perf_counter() - start)
    return min(times[0]) < 0.9 * min(times[1])


def _torch_product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    if bias is not None:
        return torch.addmm(bias, a, b, out=out)
    return out.addmm_(a, b, beta=float(accumulate))


def product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """out = a b + bias, or out += a b without a bias, by whichever is faster."""
    faster = out.dtype == torch.float32 and not out.is_cuda and sgemm_wins()
    return (sgemm if faster else _torch_product)(a, b, out, bias, accumulate)


def _own_product(a: Tensor, b: Tensor, out: Tensor, *rest: Any, **options: Any) -> Tensor:
    return (sgemm if out.dtype == torch.float32 else product)(a, b, out, *rest, **options)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), in kept memory."""
    return x if x.dtype == dtype else empty(x, x.shape, dtype).copy_(x)


def linear_native(
    multiply: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The product is made in x's dtype; of a wider weight nothing narrow outlives it."""
    out = linear_fake(x, weight, bias)
    half_bias = None if bias is None else bias.to(x.dtype)
    half = cast(weight, x.dtype)
    multiply(x.reshape(-1, x.shape[-1]), half.t(), out.view(-1, weight.shape[0]), half_bias)
    return out


def linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return empty(x, (*x.shape[:-1], weight.shape[0]))


def linear_gradients(
    multiply: Callable[..., Tensor], grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The needed ones among the gradients of x, weight and bias."""
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dx, dweight, dbias = empty_gradients(x, weight, needed)
    # forward: out = x weight^T + bias
    if needed[0]:
        multiply(grads, cast(weight, x.dtype), dx.view(rows.shape))
    if needed[1]:
        weight_gradient(multiply, grads, rows, dweight) if len(rows) else dweight.zero_()
    if needed[2]:
        dbias.copy_(grads.sum(0))
    return dx, dweight, dbias


def weight_gradient(
    multiply: Callable[..., Tensor],
    grads: Tensor,
    rows: Tensor,
    dweight: Tensor,
    accumulate: bool = False,
) -> None:
    """dweight = grads^T rows, or +=; narrow products of a wider weight are widened in slices."""
    if grads.dtype == dweight.dtype:
        multiply(grads.t(), rows, dweight, accumulate=accumulate)
        return
    outputs, width = dweight.shape
    slices = 1 if grads.is_cuda else -(-outputs * width // _SLICE) or 1  # a CPU can cache one
    slice_rows = -(-outputs // slices)
    part = empty(grads, (min(slice_rows, outputs), width))
    for low in range(0, outputs, slice_rows):
        piece = dweight[low : low + slice_rows]
        some = torch.mm(grads[:, low : low + slice_rows].t(), rows, out=part[: len(piece)])
        piece.add_(some) if accumulate else piece.copy_(some)


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


def register_linear(name: str, forward: Callable[..., Any], gradients: Callable[..., Any]) -> None:
    """Make an op with the arguments and derivative of `linear`, and its backward op."""
    register(
        f"{name}_backward(Tensor grad, Tensor x, Tensor weight, bool[] needed) "
        "-> (Tensor, Tensor, Tensor)",
        lambda grad, *inputs: empty_gradients(*inputs),
        cpu=gradients,
    )
    register(
        f"{name}(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        linear_fake,
        cpu=forward,
        save=linear_save,
        backward=functools.partial(linear_backward, getattr(torch.ops.pygpt, f"{name}_backward")),
    )


register_linear(
    "linear",
    functools.partial(linear_native, _own_product),
    functools.partial(linear_gradients, _own_product),
)
