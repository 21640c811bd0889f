"""GPT-2's GELU, alone and fused with the linear layer behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import _native
from pygpt.ops.derivative import once
from pygpt.ops.dispatch import Impl, resolve
from pygpt.ops.native import DTYPES, address, empty, register
from pygpt.ops.product import (
    FEW_ROWS,
    autocast_dtype,
    fits_linear,
    linear,
    linear_gradients,
    linear_native,
    product,
    register_linear,
)


def gelu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """GPT-2's GELU: F.gelu(x, approximate="tanh"), at several times the speed on a CPU.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", section 2.

    >>> gelu(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8412])
    """
    if impl == "auto" and x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")  # in `backend("native")` too: there is no other
    if resolve(impl, native=x.device.type == "cpu" and x.dtype in DTYPES) == "native":
        return _gelu(x)  # type: ignore[no-any-return]
    return F.gelu(x, approximate="tanh")


def _pass(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """gelu(x), or with `grad` the gradient of x."""
    x, grad = x.contiguous(), None if grad is None else grad.contiguous()
    out = empty(x, x.shape)
    _native.gelu(x.data_ptr(), DTYPES[x.dtype], x.numel(), address(grad), out.data_ptr())
    return out


def _fake(x: Tensor, grad: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once
def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _gelu_backward(*ctx.saved_tensors, grad)  # type: ignore[no-any-return]


_gelu = register("gelu(Tensor x) -> Tensor", _fake, cpu=_pass, save=_save, backward=_backward)
_gelu_backward = register("gelu_backward(Tensor x, Tensor grad) -> Tensor", _fake, cpu=_pass)


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """linear(gelu(x), weight, bias), which keeps x alone for its gradients.

    x (..., C), weight (V, C), bias (V,); returns (..., V). The backward pass computes gelu(x) once
    more: under a hundredth of a GPT's step, for a quarter less memory of its activations.

    >>> gelu_linear(torch.zeros(1, 2), torch.ones(3, 2))
    tensor([[0., 0., 0.]])
    """
    if impl == "auto" and x.device.type != "cpu":
        return linear(gelu(x), weight, bias)
    x = x.to(autocast_dtype(x))
    native = fits_linear(x, weight, bias, x.dtype)
    learns = torch.is_grad_enabled() and x.numel() >= FEW_ROWS * x.shape[-1]
    if resolve(impl, native=native, auto=learns) == "native":
        return _gelu_linear(x, weight, bias)  # type: ignore[no-any-return]
    return linear(gelu(x, impl=impl), weight, bias, impl=impl)


def _gelu_linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_native(product, _pass(x), weight, bias)


def _gelu_linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _pass(x)
    dhidden, dweight, dbias = linear_gradients(product, grad, hidden, weight, needed)
    # forward: hidden = gelu(x)
    return _pass(x, dhidden) if needed[0] else dhidden, dweight, dbias


_gelu_linear = register_linear("gelu_linear", _gelu_linear_native, _gelu_linear_gradients)
