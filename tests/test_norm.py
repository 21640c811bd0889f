"""ops.add_norm and ops.unbind_heads: torch's results, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pygpt import ops


def example(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, branch = (torch.randn(shape, generator=g) * 3 + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=g) for _ in range(2))
    leaves = [y.requires_grad_() for y in (x, branch.to(dtype), weight, bias)]
    return leaves, [torch.randn(shape, generator=g) for _ in range(2)]


def results(function, leaves, upstream):
    out = function(*leaves)
    upstream = [y.to(o.dtype) for y, o in zip(upstream, out, strict=True)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, upstream)]


def plain(x, branch, weight, bias):
    total = x + branch
    return total, F.layer_norm(total, weight.shape, weight, bias)


def native(*leaves):
    return ops.add_norm(*leaves, impl="native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 40, 16), (70, 384), (33, 1003)], ids=str)
def test_it_is_as_exact_as_torch(shape, dtype):
    leaves, upstream = example(shape, dtype)
    upstream[1] = upstream[1].to(dtype).float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        ours, theirs = (results(f, leaves, upstream) for f in (native, plain))
    wide = [y.detach().double().requires_grad_() for y in leaves]
    exact = results(plain, wide, upstream)
    assert [y.dtype for y in ours[2:]] == [y.dtype for y in leaves]
    assert ours[1].dtype == dtype
    for a, b, e in zip(ours, theirs, exact, strict=True):
        eps = torch.finfo(a.dtype).eps * (1 if a.dtype == torch.float32 else 0.51)
        slack = 4 * torch.finfo(torch.float32).eps * e.abs().max() + eps * e.abs()
        assert ((a - e).abs() <= 2 * (b - e).abs().max() + slack).all()


def test_a_row_does_not_depend_on_the_other_rows_or_on_threads():
    leaves, upstream = example((100, 70), torch.float32)
    together = results(native, leaves, upstream)
    alone = [native(*(y[i : i + 1] for y in leaves[:2]), *leaves[2:])[1] for i in range(100)]
    assert torch.equal(torch.cat(alone), together[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for a, b in zip(results(native, leaves, upstream), together, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nothing_reads_has_no_gradient(used):
    leaves, upstream = example((9, 12), torch.float32)
    for a, b in zip(
        *(
            torch.autograd.grad(f(*leaves)[used], leaves, upstream[used], allow_unused=True)
            for f in (native, plain)
        ),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_strided_inputs_and_gradients():
    leaves, upstream = example((9, 12), torch.float32)
    leaves = [y.detach().t().contiguous().t().requires_grad_() for y in leaves[:2]] + leaves[2:]
    upstream = [y[:1].expand(9, 12) for y in upstream]
    for a, b in zip(*(results(f, leaves, upstream) for f in (native, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernel_cannot_do_goes_to_torch():
    leaves, _ = example((200, 100), torch.float32)
    wide = [y.detach().double().requires_grad_() for y in leaves]
    assert ops.add_norm(*wide)[1].dtype == torch.float64
    with pytest.raises(ValueError, match="no kernel for these tensors"):
        ops.add_norm(*wide, impl="native")
    with pytest.raises(ValueError, match="branch must be"):
        ops.add_norm(leaves[0], leaves[1][:1], *leaves[2:])


def test_it_compiles_without_a_graph_break():
    leaves, upstream = example((200, 100), torch.float32)
    compiled = torch.compile(ops.add_norm, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(results(f, leaves, upstream) for f in (compiled, plain)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needed", [(0,), (0, 2), (0, 1, 2)])
def test_heads_of_one_projection_and_their_gradient(needed):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 24, generator=g, requires_grad=True)
    parts = ops.unbind_heads(x, 2)
    for part, rows in zip(parts, x.detach().chunk(3, -1), strict=True):
        assert torch.equal(part, rows.view(2, 3, 2, 4))
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    upstream = torch.randn(3, 2, 3, 2, 4, generator=g)
    sum((parts[i] * upstream[i]).sum() for i in needed).backward()
    for i, rows in enumerate(x.grad.chunk(3, -1)):
        expected = upstream[i] if i in needed else torch.zeros(2, 3, 2, 4)
        assert torch.equal(rows.reshape(2, 3, 2, 4), expected)
