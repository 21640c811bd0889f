"""Cross-entropy fused with the linear layer before it, a chunk of logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native, reference
from pygpt.ops.derivative import once
from pygpt.ops.dispatch import Impl, auto_takes, resolve, why_no_kernel
from pygpt.ops.loss import (
    Reduction,
    check_targets,
    cuda_count,
    cuda_reduce,
    cuda_rows_pass,
    quotient,
    rows_pass,
    times,
    torch_cross_entropy,
)
from pygpt.ops.native import empty, register, watched
from pygpt.ops.product import autocast_dtype, cast, empty_gradients, product, reads_wider

# Below this many logits there is nothing to save, and torch's calls cost less than ours.
_FEW_LOGITS = 3 << 14
# Bytes of logits that linear_cross_entropy holds at a time.
_LOGITS_BYTES, _CUDA_LOGITS_BYTES = 104 << 20, 1 << 29


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """cross_entropy(x weight^T + bias, targets) without ever holding the (N, V) logits.

    x (N, C), weight (V, C), bias (V,), targets (N,) int64; returns a float32 scalar or (N,). Under
    autocast the products are made in its dtype, as in F.linear; softmax and loss stay float32, and
    the weight's gradient is added up in its own dtype. Where gradients are needed, "mean" and "sum"
    compute them together with the loss; "none" makes the logits a second time.

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    check_targets("x", x, targets, reduction)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be (V, C) with C = {x.shape[1]}, got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got shape {tuple(bias.shape)}")
    dtype = autocast_dtype(x)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    native = not why_no_kernel(x.device, dtype) and weight.numel() > 0
    auto = auto_takes("linear_cross_entropy", x.device, dtype)
    few = x.shape[0] * weight.shape[0] < _FEW_LOGITS
    if few and x.is_cpu and not watched():
        auto, targets = False, targets.contiguous()
        _native.count_targets(targets.data_ptr(), len(targets), len(weight), ignore_index)
    match resolve(impl, native=native, auto=auto):
        case "native":
            together = torch.is_grad_enabled() and reduction != "none"
            wanted = [together and y is not None and y.requires_grad for y in (x, weight, bias)]
            return _linear_cross_entropy(  # type: ignore[no-any-return]
                x, weight, bias, targets, ignore_index, reduction, dtype, wanted
            )[0]
        case "torch":
            logits = F.linear(x, weight, bias)
            return torch_cross_entropy(logits, targets, ignore_index, reduction)
        case _:
            logits = x.double() @ weight.double().t()
            logits = logits if bias is None else logits + bias.double()
            return reference.cross_entropy(logits, targets, ignore_index, reduction)


def _pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    wanted: list[bool],
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the wanted ones among the gradients of x, weight and bias (else empty)."""
    rows, vocab = len(x), len(weight)
    targets = targets.contiguous()
    if x.is_cuda:
        count = cuda_count(targets, ignore_index)
        scale = x.new_ones(rows, dtype=torch.float32) if scales is None else scales
        scale = scale / count.clamp(min=1) if reduction == "mean" else scale
    else:
        divisor = _native.count_targets(targets.data_ptr(), rows, vocab, ignore_index)
        divisor = divisor if reduction == "mean" else 1
    dx, dweight, dbias = empty_gradients(x, weight, wanted)
    dbias.zero_()
    if not rows:
        dweight.zero_()
    losses, total = torch.empty(rows, device=x.device), 0.0
    half_x = cast(x, dtype)
    operand = weight if reads_wider(dtype, x.device) else cast(weight, dtype)
    most = _CUDA_LOGITS_BYTES if x.is_cuda else _LOGITS_BYTES
    chunks = -(-rows * vocab * half_x.element_size() // most) or 1
    chunk = max(1, -(-rows // chunks))
    buffer = empty(half_x, (chunk, vocab))
    for start in range(0, rows, chunk):
        piece = slice(start, min(start + chunk, rows))
        logits, x_piece = buffer[: piece.stop - start], half_x[piece]
        product(x_piece, operand.t(), logits, bias)
        if x.is_cuda:
            losses[piece] = cuda_rows_pass(
                logits, targets[piece], ignore_index, scale[piece] if any(wanted) else None
            )
        else:
            total += rows_pass(
                logits,
                targets[piece],
                ignore_index,
                losses[piece],
                logits if any(wanted) else None,
                1.0 / max(divisor, 1),
                None if scales is None else scales[piece],
            )
        if wanted[0]:
            product(logits, operand, dx[piece])
        if wanted[1]:
            product(logits.t(), x_piece, dweight, accumulate=start > 0)
        if wanted[2]:
            dbias += logits.sum(0, dtype=dbias.dtype)
    if reduction == "none":
        loss = losses
    elif x.is_cuda:
        loss = cuda_reduce(losses, count, reduction)
    else:
        loss = quotient(total, divisor)
    return loss, dx, dweight, dbias


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, *empty_gradients(x, weight, wanted)


def _backward_native(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, for `grad` of each row's loss."""
    scales = grad.contiguous()
    return _pass(x, weight, bias, targets, ignore_index, "none", dtype, wanted, scales)[1:]


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, rest[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, targets, ctx.ignore_index, ctx.reduction, ctx.dtype, _ = inputs
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.save_for_backward(x, weight, bias, targets)
    else:
        ctx.save_for_backward(*output[1:])


@once
def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    if ctx.reduction == "none":
        gradients = _linear_cross_entropy_backward(
            grad, *ctx.saved_tensors, ctx.ignore_index, ctx.dtype, needed
        )
    else:
        gradients = (
            times(x, grad) if need else x for x, need in zip(ctx.saved_tensors, needed, strict=True)
        )
    found = (x if need else None for x, need in zip(gradients, needed, strict=True))
    return *found, None, None, None, None, None


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index"
_linear_cross_entropy = register(
    f"linear_cross_entropy({_INPUTS}, str reduction, ScalarType dtype, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    cpu=_pass,
    cuda=_pass,
    save=_save,
    backward=_backward,
)
_linear_cross_entropy_backward = register(
    f"linear_cross_entropy_backward(Tensor grad, {_INPUTS}, ScalarType dtype, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_fake,
    cpu=_backward_native,
    cuda=_backward_native,
)
