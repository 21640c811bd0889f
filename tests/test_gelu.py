"""ops.gelu: torch's tanh GELU and its gradient, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pygpt import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(function, x, upstream):
    x = x.detach().requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, x, upstream.to(x.dtype))]


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 16385), (40_001,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_torch(dtype, shape):
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=g) * 4).to(dtype)
    upstream = torch.randn(shape, generator=g)
    ours = results(lambda t: ops.gelu(t, impl="native"), x, upstream)
    naive, exact = results(tanh_gelu, x, upstream), results(tanh_gelu, x.double(), upstream)
    for a, b, e in zip(ours, naive, exact, strict=True):
        slack = 2 * torch.finfo(dtype).eps * e.abs().max()
        error, allowed = (a - e).abs().max(), 2 * (b - e).abs().max() + slack
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_are_those_of_the_limit(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, 60.0, -60.0, 0.0, torch.nan]).to(dtype)
    value, slope = results(lambda t: ops.gelu(t, impl="native"), x, torch.ones(6))
    assert value[:5].abs().tolist() == [x[0].item(), 0.0, 60.0, 0.0, 0.0]
    assert slope[:5].abs().tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    assert value[5].isnan()
    assert slope[5].isnan()


def test_gradcheck_in_float64():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.gelu, [x])


def test_any_strides_are_read():
    x, upstream = torch.randn(9, 14), torch.randn(7, 9)
    ours = results(lambda t: ops.gelu(t[:, ::2].t(), impl="native"), x, upstream)
    for a, b in zip(ours, results(lambda t: tanh_gelu(t[:, ::2].t()), x, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_the_registered_ops_are_sound():
    x = torch.randn(5, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.pygpt.gelu.default, (x,))
    torch.library.opcheck(torch.ops.pygpt.gelu_backward.default, (x.detach(), x.detach()))


# --- gelu_linear ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_linear_in_one_are_as_exact_as_torch(dtype, bias):
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(shape, generator=g) for shape in ((5, 27, 70), (33, 70), (33,))]
    leaves = [t.to(dtype).requires_grad_() for t in leaves[: 2 + bias]]
    upstream = torch.randn(5, 27, 33, generator=g)

    def gradients(function, leaves):
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    def naive(x, *rest):
        return F.linear(tanh_gelu(x), *rest)

    ours = gradients(lambda *t: ops.gelu_linear(*t, impl="native"), leaves)
    plain = gradients(naive, leaves)
    exact = gradients(naive, [t.detach().double().requires_grad_() for t in leaves])
    for a, b, e in zip(ours, plain, exact, strict=True):
        slack = 2 * torch.finfo(dtype).eps * e.abs().max()
        error, allowed = (a - e).abs().max(), 2 * (b - e).abs().max() + slack
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def test_gelu_linear_keeps_its_input_alone():
    kept = []
    x, weight = torch.randn(100, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gelu_linear(x, weight)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_gelu_linear_computes_in_the_dtype_of_autocast():
    x, weight = torch.randn(100, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.gelu_linear(x, weight)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), (x, weight))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_gelu_linears_registered_ops_are_sound():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((66, 5), (3, 5), (3,)))
    torch.library.opcheck(torch.ops.pygpt.gelu_linear.default, (x, weight, bias))
    torch.library.opcheck(
        torch.ops.pygpt.gelu_linear_backward.default,
        (torch.randn(66, 3), x.detach(), weight.detach(), [True, True, True]),
    )


def test_devices_without_a_kernel_of_it_use_torchs_even_where_native_is_asked_for():
    x, weight = torch.empty(70, 8, device="meta"), torch.empty(5, 8, device="meta")
    with ops.backend("native"):  # as a whole model on a GPU, whose attention has a native kernel
        assert ops.gelu(x).shape == (70, 8)
        assert ops.gelu_linear(x, weight).shape == ops.linear(x, weight).shape == (70, 5)
    with pytest.raises(ValueError, match="impl='native' has no kernel"):
        ops.gelu(x, impl="native")
