"""Cross-entropy of logits, and the row passes that the fused loss shares."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native, reference
from pygpt.ops.derivative import once
from pygpt.ops.dispatch import Impl, auto_takes, resolve, why_no_kernel
from pygpt.ops.native import DTYPES, address, launch, register, rows

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    inplace: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy in nats of logits (N, V) at targets (N,) int64, as a float32 scalar or (N,).

    Rows whose target is `ignore_index` count for nothing; any other target outside [0, V) is a
    ValueError. The mean is over the rows that count. With `inplace` the gradient is written over
    the logits, which saves their size in memory and leaves nothing readable in them.

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(1.3863)
    """
    check_targets("logits", logits, targets, reduction)
    native = not why_no_kernel(logits.device, logits.dtype) and logits.shape[1] > 0
    match resolve(
        impl, native=native, auto=auto_takes("cross_entropy", logits.device, logits.dtype)
    ):
        case "native":
            needed = logits.requires_grad and torch.is_grad_enabled()
            if inplace and needed and reduction != "none" and not torch.compiler.is_compiling():
                return _Inplace.apply(logits, targets, ignore_index, reduction)  # type: ignore[no-any-return,no-untyped-call]
            loss, _ = _cross_entropy(
                logits, targets, ignore_index, reduction, needed and reduction != "none"
            )
            return loss  # type: ignore[no-any-return]
        case "torch":
            return torch_cross_entropy(logits, targets, ignore_index, reduction)
        case _:
            return reference.cross_entropy(logits, targets, ignore_index, reduction)


def torch_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """F.cross_entropy with a float32 softmax, as the native kernels have it."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def check_targets(name: str, x: Tensor, targets: Tensor, reduction: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape ({x.shape[0]},), got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def rows_pass(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    losses: Tensor,
    gradient: Tensor | None = None,
    scale: float = 1.0,
    scales: Tensor | None = None,
) -> float:
    """The loss of each row, its gradient times `scale` and `scales`; returns the losses' sum."""
    return _native.cross_entropy(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        targets.data_ptr(),
        ignore_index,
        losses.data_ptr(),
        address(gradient),
        0 if gradient is None else gradient.stride(0),
        scale,
        address(scales),
    )


def _pass(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, gradient: Tensor | None
) -> Tensor:
    """The reduced loss; its gradient goes to `gradient`, which may be the logits themselves."""
    if logits.is_cuda:
        return _cuda_pass(logits, targets, ignore_index, reduction, gradient)
    targets, losses = targets.contiguous(), torch.empty(logits.shape[0])
    count = _native.count_targets(targets.data_ptr(), len(targets), logits.shape[1], ignore_index)
    divisor = count if reduction == "mean" else 1
    scale = 1.0 / max(divisor, 1)
    total = rows_pass(logits, targets, ignore_index, losses, gradient, scale)
    return losses if reduction == "none" else quotient(total, divisor)


def _cuda_pass(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, gradient: Tensor | None
) -> Tensor:
    count, scale = cuda_count(targets, ignore_index), None
    if gradient is not None:
        logits = gradient.copy_(logits)
        scale = 1.0 / count.clamp(min=1) if reduction == "mean" else torch.ones_like(count)
    losses = cuda_rows_pass(logits, targets, ignore_index, scale)
    return losses if reduction == "none" else cuda_reduce(losses, count, reduction)


def cuda_count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum(dtype=torch.float32)


def cuda_rows_pass(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: Tensor | None
) -> Tensor:
    """The loss of each row; with `scale`, one or one per row, the logits become its gradient."""
    losses = torch.empty(logits.shape[0], device=logits.device)
    targets = targets.contiguous()
    scale = None if scale is None else scale.contiguous()
    if losses.numel():
        _native.cuda_cross_entropy(
            launch(logits),
            logits.data_ptr(),
            DTYPES[logits.dtype],
            logits.shape[0],
            logits.shape[1],
            logits.stride(0),
            targets.data_ptr(),
            ignore_index,
            losses.data_ptr(),
            address(scale),
            0 if scale is None else scale.dim(),
        )
    return losses


def cuda_reduce(losses: Tensor, count: Tensor, reduction: str) -> Tensor:
    return losses.sum() / count if reduction == "mean" else losses.sum()


def quotient(total: float, divisor: int) -> Tensor:
    return torch.tensor(total / divisor if divisor else math.nan)


class _Inplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore: int, reduction: str) -> Tensor:
        gradient = rows(logits.detach())
        loss = _pass(gradient, targets, ignore, reduction, gradient)
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return times(gradient, grad), None, None, None


def times(gradient: Tensor, grad: Tensor) -> Tensor:
    """gradient * grad, without a pass over it in the common case of a loss that is the root."""
    traced = type(grad) is not Tensor
    if not traced and grad.device.type == "cpu" and float(grad) == 1.0:
        return gradient
    return gradient * grad


def _forward_native(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss and, if wanted, its gradient (else an empty tensor)."""
    logits = rows(logits)
    gradient = logits.new_empty(logits.shape if with_gradient else (0, 0))
    wanted = gradient if with_gradient else None
    return _pass(logits, targets, ignore_index, reduction, wanted), gradient


def _fake(
    logits: Tensor, targets: Tensor, ignore_index: int, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if with_gradient else (0, 0))


def _backward_native(grad: Tensor, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The logits' gradient, for `grad` of each row's loss."""
    logits = rows(logits)
    if logits.is_cuda:
        gradient = logits.clone()
        cuda_rows_pass(gradient, targets, ignore_index, grad)
        return gradient
    gradient = logits.new_empty(logits.shape)
    losses = torch.empty(logits.shape[0])
    rows_pass(logits, targets.contiguous(), ignore_index, losses, gradient, 1.0, grad.contiguous())
    return gradient


def _backward_fake(grad: Tensor, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index, ctx.reduction, _ = inputs
    ctx.set_materialize_grads(False)
    if ctx.reduction == "none":
        ctx.save_for_backward(logits, targets)
    else:
        ctx.save_for_backward(output[1])


@once
def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.reduction == "none":
        gradient = _cross_entropy_backward(grad, *ctx.saved_tensors, ctx.ignore_index)
    else:
        gradient = times(ctx.saved_tensors[0], grad)
    return gradient, None, None, None, None


_cross_entropy = register(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, str reduction, "
    "bool with_gradient) -> (Tensor, Tensor)",
    _fake,
    cpu=_forward_native,
    cuda=_forward_native,
    save=_save,
    backward=_backward,
)
_cross_entropy_backward = register(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, int ignore_index) "
    "-> Tensor",
    _backward_fake,
    cpu=_backward_native,
    cuda=_backward_native,
)
