"""The embedding of a model whose head is the same matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt.ops.native import watched


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """F.embedding(ids, weight), and the weight for the head that ends the same forward pass.

    The gradient of a head has every row of the weight (V, C). Left to itself autograd makes a
    second matrix for the rows that were looked up and a third for the sum; this adds them to the
    head's. Under torch.compile, and without gradients, there is nothing to win; on a GPU index_add_
    would not repeat to the bit.

    >>> rows, head = tied_embedding(torch.tensor([1]), torch.eye(2))
    >>> rows
    tensor([[0., 1.]])
    """
    learns = torch.is_grad_enabled() and weight.requires_grad
    if not learns or weight.is_cuda or watched():
        return F.embedding(ids, weight), weight
    return _TiedEmbedding.apply(ids, weight)  # type: ignore[no-any-return,no-untyped-call]


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, drows: Tensor, dhead: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        # A graph that is kept may hold the head's gradient for another backward pass.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            dhead = dhead.clone()
        return None, dhead.index_add_(0, ids.flatten(), drows.flatten(0, -2).to(dhead.dtype))
