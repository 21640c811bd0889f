"""ops.linear: F.linear's results from the native products, forward and backward."""

from __future__ import annotations

import itertools
import os
import re

import pytest
import torch
from torch.nn import functional as F

from pygpt import ops
from pygpt.ops.product import gemm

SOAK = int(os.environ.get("PYGPT_SOAK", "1"))


def example(rows, cols, depth, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (rows, depth) if isinstance(rows, int) else (*rows, depth)
    x = torch.randn(shape, generator=g, requires_grad=True)
    weight = torch.randn(cols, depth, generator=g, requires_grad=True)
    bias = torch.randn(cols, generator=g, requires_grad=True)
    return (x, weight, bias), torch.randn(*shape[:-1], cols, generator=g)


def results(function, leaves, upstream):
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (5, 7, 3),
        (12, 32, 192),
        (13, 33, 193),
        (64, 1003, 33),
        (300, 17, 1700),
        (2, 2000, 700),
        ((3, 50), 48, 100),
    ],
    ids=str,
)
def test_it_is_as_exact_as_torch(shape):
    leaves, upstream = example(*shape)
    ours = results(lambda *t: ops.linear(*t, impl="native"), leaves, upstream)
    naive = results(F.linear, leaves, upstream)
    exact = results(F.linear, [t.detach().double().requires_grad_() for t in leaves], upstream)
    for a, b, e in zip(ours, naive, exact, strict=True):
        slack = 2 * torch.finfo(torch.float32).eps * e.abs().max()
        error, allowed = (a - e).abs().max(), 2 * (b - e).abs().max() + slack
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("seed", range(40 * SOAK))
def test_random_shapes_and_strides(seed):
    g = torch.Generator().manual_seed(seed)
    rows, cols, depth = (int(2 ** (9 * torch.rand((), generator=g))) for _ in range(3))
    (x, weight, bias), upstream = example(rows, cols, depth, seed=seed)
    if seed % 2:
        x = x.detach().t().contiguous().t().requires_grad_()
        weight = F.pad(weight.detach(), (3, 5))[:, 3:-5].requires_grad_()
        upstream = upstream.t().contiguous().t()
    if seed % 5 == 0:
        upstream = upstream[:1].expand(rows, cols)
    ours = results(lambda *t: ops.linear(*t, impl="native"), (x, weight, bias), upstream)
    for a, b in zip(ours, results(F.linear, (x, weight, bias), upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "some"), [(16, 1), (100, 17), (1070, 170)])
def test_a_row_does_not_depend_on_the_other_rows_or_on_threads(rows, some):
    (x, weight, bias), _ = example(rows, 1070, 500)
    with torch.no_grad():
        together = ops.linear(x, weight, bias, impl="native")
        for first in range(0, rows - some + 1, some):
            part = ops.linear(x[first : first + some], weight, bias, impl="native")
            assert torch.equal(together[first : first + some], part)
        threads = torch.get_num_threads()
        try:
            for n in (1, 7):
                torch.set_num_threads(n)
                assert torch.equal(ops.linear(x, weight, bias, impl="native"), together)
        finally:
            torch.set_num_threads(threads)


def test_only_what_is_needed_gets_a_gradient():
    (x, weight, bias), _ = example(9, 5, 4)
    ops.linear(x.detach(), weight, impl="native").sum().backward()
    assert weight.grad is not None
    ops.linear(x, weight.detach(), bias, impl="native").sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(9, 4))
    torch.testing.assert_close(bias.grad, torch.full((5,), 9.0))


def test_no_rows_give_no_output_and_a_gradient_of_zero():
    (x, weight, bias), _ = example(0, 5, 4)
    out = ops.linear(x, weight, bias, impl="native")
    assert out.shape == (0, 5)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_exact_as_torch_and_keeps_no_narrow_weight(dtype):
    leaves, upstream = example(70, 300, 96)
    exact = results(F.linear, [x.detach().double().requires_grad_() for x in leaves], upstream)
    with torch.autocast("cpu", dtype=dtype):
        ours = results(ops.linear, leaves, upstream)
        theirs = results(F.linear, leaves, upstream)
        out = ops.linear(*leaves)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert any(x is leaves[1] for x in out.grad_fn.saved_tensors)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        eps = 2 * torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + eps


@pytest.mark.parametrize("seed", range(30 * SOAK))
def test_a_product_of_two_widths_rounds_its_operands_alone(seed):
    g = torch.Generator().manual_seed(seed)
    m, n, k = (int(2 ** (11 * torch.rand((), generator=g))) for _ in range(3))
    wide, narrow = torch.float32, torch.bfloat16
    types = [(narrow, wide, narrow), (narrow, wide, wide), (narrow, narrow, wide)]
    types += [(wide, narrow, wide), (narrow, narrow, narrow)]
    a_type, b_type, type_ = types[seed % 5]
    a, b = torch.randn(m, k, generator=g), torch.randn(k, n, generator=g)
    a = (a if seed % 2 else a.t().contiguous().t()).to(a_type)
    b = (b if seed % 3 else b.t().contiguous().t()).to(b_type)
    bias, before = torch.randn(n, generator=g), torch.randn(m, n, generator=g).to(type_)
    exact = a.to(narrow).double() @ b.to(narrow).double()
    terms = a.double().abs() @ b.double().abs() + 4
    error = torch.finfo(wide).eps * k**0.5 * terms
    out = torch.full_like(before, torch.nan)
    gemm(a, b, out, bias)
    for result, expected in (
        (out, exact + bias),
        (gemm(a, b, more := before.clone(), accumulate=True) or more, exact + before),
    ):
        rounding = torch.finfo(type_).eps / 2 * expected.abs()
        assert ((result - expected).abs() <= error + rounding).all(), f"seed {seed}"


def test_a_long_sum_in_bfloat16_is_rounded_once():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 5000, generator=g).bfloat16(), torch.randn(5000, 40, generator=g)
    outs = torch.empty(20, 40, dtype=torch.bfloat16), torch.empty(20, 40)
    for out in outs:
        gemm(a, b, out)
    assert torch.equal(outs[0], outs[1].bfloat16())


@pytest.mark.parametrize("learns", [True, False])
def test_bfloat16_alone_is_ours_where_torch_is_slow_in_it(learns, monkeypatch):
    leaves, _ = example(70, 40, 33)
    leaves = [x.detach().bfloat16().requires_grad_(learns) for x in leaves]
    exact = F.linear(*(x.detach().double() for x in leaves))
    calls = []
    monkeypatch.setattr("pygpt.ops.product.gemm", lambda *x: calls.append(x) or gemm(*x))
    for wins in (True, False):
        monkeypatch.setattr("pygpt.ops.product._own_wins", {"bfloat16 alone": wins})
        with torch.set_grad_enabled(learns):
            out = ops.linear(*leaves)
        assert bool(calls) is wins
        assert (out - exact).abs().max() <= 2**-7 * exact.abs().max()
        calls.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("depth", [1, 5, 16, 31, 33, 96, 500])
def test_few_rows(depth, transposed, dtype):
    g = torch.Generator().manual_seed(depth)
    for rows, cols in itertools.product((1, 2, 3, 5, 8, 16), (1, 3, 16, 21, 32, 150)):
        x = torch.randn(rows, 2 * depth, generator=g).to(dtype)[:, 1 : depth + 1]
        lines = (depth, cols) if transposed else (cols, depth)
        around = torch.full([n + 5 for n in lines], torch.nan, dtype=dtype)  # must not be read
        weight = around[1 : lines[0] + 1, 2 : lines[1] + 2]
        weight = weight.t() if transposed else weight
        weight.copy_(torch.randn(cols, depth, generator=g))
        bias = torch.randn(cols, generator=g)
        exact = x.double() @ weight.double().t() + bias
        terms = x.double().abs() @ weight.double().abs().t() + bias.abs()
        for out_type in {torch.float32: 0, dtype: 0}:
            room = torch.full((rows, cols + 2), torch.nan, dtype=out_type)
            gemm(x, weight.t(), room[:, :cols], bias)
            error = torch.finfo(torch.float32).eps * depth**0.5 * terms
            error = error + torch.finfo(out_type).eps / 2 * exact.abs()
            assert ((room[:, :cols] - exact).abs() <= error).all(), (rows, cols)
            assert room[:, cols:].isnan().all()
        with torch.no_grad():
            gemm(x, weight.t(), out := room[:, :cols], bias.to(dtype))
            direct = ops.linear(x.contiguous(), weight, bias.to(dtype), impl="native")
        assert torch.equal(direct, out.to(dtype)) and direct.dtype == dtype


def test_float64_goes_to_torch():
    (x, weight, _), _ = example(70, 5, 4)
    assert ops.linear(x.double(), weight.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="no kernel for these tensors"):
        ops.linear(x.double(), weight.double(), impl="native")


def test_the_registered_ops_are_sound():
    (x, weight, bias), upstream = example((2, 3), 5, 4)
    torch.library.opcheck(torch.ops.pygpt.linear.default, (x, weight, bias))
    torch.library.opcheck(
        torch.ops.pygpt.linear_backward.default,
        (upstream, x.detach(), weight.detach(), [True, False, True]),
    )


def test_it_compiles_without_a_graph_break():
    leaves, upstream = example(70, 5, 4)

    def function(x, weight, bias):
        return ops.linear(x * 2, weight, bias) + ops.linear(x, weight, impl="native")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = results(function, leaves, upstream)
    for a, b in zip(results(compiled, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [ops.linear, ops.gelu_linear])
@pytest.mark.parametrize(
    "shapes",
    [
        ((70, 5), (3, 7), None),
        ((70, 5), (3, 5), (1,)),
        ((70, 5), (3, 5), (4,)),
        ((70, 5), (5,), None),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_reach_torch_and_no_kernel(function, shapes):
    x, weight, bias = (None if s is None else torch.ones(s, requires_grad=True) for s in shapes)
    with pytest.raises(ValueError, match="no kernel for these tensors"):
        function(x, weight, bias, impl="native")
    try:
        expected = function(x, weight, bias, impl="torch")
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
            function(x, weight, bias)
    else:
        assert torch.equal(function(x, weight, bias), expected)


@pytest.mark.parametrize("function", [ops.linear, ops.gelu_linear])
@pytest.mark.parametrize("shape", list(itertools.product((0, 70), (0, 3), (0, 5))), ids=str)
def test_every_size_may_be_zero(function, shape):
    leaves, upstream = example(*shape)
    for a, b in zip(
        results(function, leaves, upstream),
        results(lambda *x: function(*x, impl="torch"), leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
