"""What holds for the derivatives of every native op, and where there is no memory to read."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pygpt import ops

TARGETS = torch.tensor([0, 3, -100, 1])
OPS = {
    "causal_attention": (
        lambda q, k, v, **impl: ops.causal_attention(q, k, v, **impl),
        [(1, 4, 2, 8)] * 3,
    ),
    "linear": (ops.linear, [(4, 5), (3, 5), (3,)]),
    "gelu": (ops.gelu, [(4, 5)]),
    "gelu_linear": (ops.gelu_linear, [(4, 5), (3, 5), (3,)]),
    "add_norm": (lambda *x, **impl: ops.add_norm(*x, **impl)[1], [(4, 5), (4, 5), (5,), (5,)]),
    "cross_entropy": (lambda x, **impl: ops.cross_entropy(x, TARGETS, **impl), [(4, 5)]),
    "cross_entropy none": (
        lambda x, **impl: ops.cross_entropy(x, TARGETS, reduction="none", **impl),
        [(4, 5)],
    ),
    "linear_cross_entropy": (
        lambda x, w, **impl: ops.linear_cross_entropy(x, w, TARGETS, **impl),
        [(4, 5), (6, 5)],
    ),
    "linear_cross_entropy none": (
        lambda x, w, **impl: ops.linear_cross_entropy(x, w, TARGETS, reduction="none", **impl),
        [(4, 5), (6, 5)],
    ),
}


def leaves(shapes, **options):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to(**options).requires_grad_() for s in shapes]


@pytest.mark.parametrize("watched", [False, True])  # by a mode that wants the dispatcher
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused_and_first_ones_are_not(name, watched):
    function, shapes = OPS[name]
    x = leaves(shapes)
    with FlopCounterMode(display=False) if watched else torch.enable_grad():
        total = function(*x, impl="native").sum()
        kept = torch.autograd.grad(total, x, create_graph=True)
        plain = torch.autograd.grad(total, x)
        for a, b in zip(kept, plain, strict=True):
            assert torch.equal(a, b)
        # A term that has a second derivative does not hide the ones that have none.
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(sum(y.square().sum() for y in (*kept, *x)), x)


@pytest.mark.parametrize("name", [name for name in OPS if "attention" not in name])
def test_torchs_path_has_second_derivatives(name):
    function, shapes = OPS[name]
    x = leaves(shapes, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, impl="torch"), x)


@pytest.mark.parametrize("name", ["add_norm", "gelu_linear", "linear"])
def test_tensors_of_the_meta_device_give_shapes(name):
    function, shapes = OPS[name]
    assert function(*leaves(shapes, device="meta")).shape == function(*leaves(shapes)).shape
