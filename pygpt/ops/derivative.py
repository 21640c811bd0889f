"""Gradients that refuse to be differentiated: theirs would be wrong without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward function whose results raise RuntimeError where they are differentiated.

    torch.autograd.function.once_differentiable lets those pass whose incoming gradient is constant.
    """

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        # What the results depend on, so that autograd's way back to it leads through the error.
        sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        if isinstance(found, Tensor):
            return _Refused.apply(found, *sources)  # type: ignore[no-untyped-call]
        return tuple(
            x if x is None else _Refused.apply(x, *sources)  # type: ignore[no-untyped-call]
            for x in found
        )

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "native ops can be differentiated once; for second derivatives use impl='torch' or "
            "ops.backend('torch')"
        )
