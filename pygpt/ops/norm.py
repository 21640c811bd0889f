"""The residual sum with the LayerNorm that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native
from pygpt.ops.derivative import once
from pygpt.ops.dispatch import Impl, resolve
from pygpt.ops.native import DTYPES, address, empty
from pygpt.ops.product import autocast_dtype

# Below this many numbers a call of ours costs more than torch's two.
_FEW = 1 << 14


def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """x + branch, and F.layer_norm of it over the last dimension.

    x and branch (..., C) of one shape, weight and bias (C,). Where a float32 x learns on a CPU one
    kernel makes both in one visit, the second in autocast's dtype, and its gradients in another.
    Source: Ba et al., "Layer Normalization", section 3.

    >>> add_norm(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2))
    (tensor([[1., 3.]]), tensor([[-1.0000,  1.0000]]))
    """
    if not x.shape == branch.shape or not weight.shape == bias.shape == x.shape[-1:]:
        raise ValueError(
            f"x and branch must be (..., C) and weight and bias (C,), got {tuple(x.shape)}, "
            f"{tuple(branch.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    dtype = autocast_dtype(x)
    native = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and branch.dtype == dtype in DTYPES
        and branch.is_cpu
        and weight.is_cpu
        and bias.is_cpu
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )
    learns = torch.is_grad_enabled() and x.numel() >= _FEW
    # Torch's for what has no kernel in `backend("native")` too: a model is to run there.
    match resolve(impl, native=native or impl == "auto", auto=native and learns):
        case "native" if native:
            return _AddNorm.apply(x, branch, weight, bias, eps)  # type: ignore[no-any-return,no-untyped-call]
        case "native" | "torch":
            total = x + branch
            return total, F.layer_norm(total, weight.shape, weight, bias, eps)
        case _:
            total = x.double() + branch.double()
            normed = F.layer_norm(total, weight.shape, weight.double(), bias.double(), eps)
            return total.to(x.dtype), normed.to(dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, branch = x.contiguous(), branch.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        total, normed = empty(x, x.shape), empty(branch, x.shape)
        moments = empty(x, (*x.shape[:-1], 2))
        width = x.shape[-1]
        _native.add_norm(
            DTYPES[branch.dtype],
            x.numel() // width,
            width,
            x.data_ptr(),
            branch.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            eps,
            total.data_ptr(),
            normed.data_ptr(),
            moments.data_ptr(),
        )
        ctx.save_for_backward(total, moments, weight)
        ctx.set_materialize_grads(False)
        ctx.dtype = branch.dtype
        return total, normed

    @staticmethod
    @once
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Any, ...]:
        total, moments, weight = ctx.saved_tensors
        narrow = ctx.dtype != total.dtype
        if dnormed is None:
            dbranch = None if dtotal is None else dtotal.to(ctx.dtype)
            return dtotal, dbranch, None, None, None
        dtotal = None if dtotal is None else dtotal.contiguous()
        dnormed = dnormed.contiguous()
        dx, dbias = empty(total, total.shape), torch.empty_like(weight)
        dweight = torch.empty_like(weight)
        dbranch = empty(dnormed, total.shape) if narrow else dx
        width = total.shape[-1]
        _native.add_norm_backward(
            DTYPES[ctx.dtype],
            total.numel() // width,
            width,
            total.data_ptr(),
            weight.data_ptr(),
            moments.data_ptr(),
            dnormed.data_ptr(),
            address(dtotal),
            dx.data_ptr(),
            dbranch.data_ptr() if narrow else 0,
            dweight.data_ptr(),
            dbias.data_ptr(),
        )
        return dx, dbranch, dweight, dbias, None
