"""One projection's result as the queries, keys and values of each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pygpt.ops.native import empty, watched


def unbind_heads(x: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k and v, (B, T, H, D) each, of x (B, T, 3 H D), whose gradient is kept memory.

    >>> [part.shape for part in unbind_heads(torch.zeros(1, 2, 24), 2)]
    [torch.Size([1, 2, 2, 4]), torch.Size([1, 2, 2, 4]), torch.Size([1, 2, 2, 4])]
    """
    learns = torch.is_grad_enabled() and x.requires_grad and x.device.type == "cpu"
    if learns and not watched():
        return _UnbindHeads.apply(x, n_heads)  # type: ignore[no-any-return,no-untyped-call]
    return _parts(x, n_heads)


def _parts(x: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = x.view(*x.shape[:-1], 3, n_heads, -1).unbind(-3)
    return q, k, v


class _UnbindHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_heads: int) -> tuple[Tensor, ...]:
        return _parts(x, n_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        batch, tokens, heads, dim = grads[0].shape
        together = empty(grads[0], (batch, tokens, 3, heads, dim))
        return torch.stack(grads, 2, out=together).flatten(2), None
