"""ops.cross_entropy and ops.linear_cross_entropy against float64, torch and each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pygpt import ops
from pygpt.ops import linear_loss

REDUCTIONS = ("mean", "sum", "none")
SHAPES = [(1, 1, 1), (3, 17, 5), (40, 65, 16), (37, 1003, 24), (130, 4099, 8)]


def example(rows, vocab, width, dtype=torch.float32, *, seed=0, spread=1.0):
    """Leaves x, weight, bias; targets, some of them ignored; an upstream gradient per row."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=g) * spread).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[1::4] = -100
    return x, weight, bias, targets, torch.randn(rows, generator=g)


def results(loss, leaves, upstream, reduction):
    grad = upstream if reduction == "none" else upstream[0]
    gradients = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
    return [loss.detach(), *gradients]


def assert_as_exact(ours, naive, exact, dtype):
    """style.md's rule: at most twice the naive error, plus two units in the last place."""
    for a, b, e in zip(ours, naive, exact, strict=True):
        slack = 2 * torch.finfo(dtype).eps * e.double().abs().max()
        error, allowed = (a - e).abs().max(), 2 * (b - e).abs().max() + slack
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_cross_entropy_is_as_exact_as_torch(dtype, shape, reduction):
    *leaves, targets, upstream = example(*shape, dtype)
    x, weight, bias = leaves
    ours, naive, exact = (
        results(
            ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction, impl=impl),
            leaves,
            upstream,
            reduction,
        )
        for impl in ("native", "torch", "reference")
    )
    assert ours[0].dtype == torch.float32
    assert_as_exact(ours, naive, exact, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 17), (40, 65), (33, 1003), (9, 50257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_is_as_exact_as_torch(dtype, shape, reduction):
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(shape, generator=g) * 4).to(dtype).requires_grad_()
    *_, targets, upstream = example(*shape, 1)
    ours, naive, exact = (
        results(
            ops.cross_entropy(logits, targets, reduction=reduction, impl=impl),
            [logits],
            upstream,
            reduction,
        )
        for impl in ("native", "torch", "reference")
    )
    assert_as_exact(ours, naive, exact, dtype)


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_chunks_do_not_show(rows, monkeypatch):
    *leaves, targets, upstream = example(rows, 301, 12)
    x, weight, bias = leaves
    whole = results(
        ops.linear_cross_entropy(x, weight, targets, bias=bias), leaves, upstream, "mean"
    )
    monkeypatch.setattr(linear_loss, "_LOGITS_BYTES", 16 * 301 * 4)
    pieces = results(
        ops.linear_cross_entropy(x, weight, targets, bias=bias), leaves, upstream, "mean"
    )
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_large_logits_do_not_overflow(shift):
    logits = (torch.tensor([[0.0, 5.0, -300.0], [80.0, -80.0, 0.0]]) + shift).requires_grad_()
    targets = torch.tensor([2, 0])
    loss = ops.cross_entropy(logits, targets, impl="native")
    expected = F.cross_entropy(logits.double(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = (logits.double().softmax(1) - F.one_hot(targets, 3)) / 2
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-7)


def test_a_masked_word_has_no_probability_and_no_gradient():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    loss = ops.cross_entropy(logits, torch.tensor([0]), impl="native")
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(loss, -expected[0].log())
    torch.testing.assert_close(
        gradient, torch.stack([expected[0] - 1, expected[1] * 0, expected[1]])[None]
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_in_float64(reduction):
    *leaves, targets, _ = example(5, 7, 3, torch.float64)

    def loss(x, weight, bias):
        return ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_autocast_makes_the_products_in_its_dtype_and_the_loss_in_float32(impl):
    *leaves, targets, upstream = example(64, 301, 32)
    x, weight, bias = leaves
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, targets, bias=bias, impl=impl)
    assert loss.dtype == torch.float32
    got = results(loss, leaves, upstream, "mean")
    assert all(g.dtype == torch.float32 for g in got)
    exact = results(
        ops.linear_cross_entropy(x, weight, targets, bias=bias, impl="reference"),
        leaves,
        upstream,
        "mean",
    )
    for a, e in zip(got, exact, strict=True):
        difference = (a - e).abs().max() / e.abs().max()
        assert 1e-7 < difference < 2e-2  # bf16's, neither float32's nor nonsense


def test_only_what_is_needed_gets_a_gradient():
    *leaves, targets, _ = example(6, 11, 4)
    x, weight, bias = leaves
    loss = ops.linear_cross_entropy(x, weight.detach(), targets, bias=bias, impl="native")
    loss.backward()
    assert x.grad is not None
    assert bias.grad is not None
    with torch.no_grad():
        assert not ops.linear_cross_entropy(x, weight, targets, impl="native").requires_grad


def test_backward_can_be_taken_twice_and_gradients_add_up():
    *leaves, targets, _ = example(6, 11, 4)
    x, weight, _ = leaves
    loss = ops.linear_cross_entropy(x, weight, targets, impl="native")
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    (loss * 3).backward()
    torch.testing.assert_close(weight.grad, once * 4)


def test_inplace_gives_the_same_and_writes_the_gradient_over_the_logits():
    *_, targets, _ = example(6, 11, 4)
    leaf = torch.randn(6, 11, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (expected,) = torch.autograd.grad(ops.cross_entropy(leaf, targets), leaf)
    logits = leaf * 1.0
    loss = ops.cross_entropy(logits, targets, inplace=True, impl="native")
    (got,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(logits.detach(), expected)
    probabilities = leaf.softmax(1)  # softmax's backward needs its result, which is gone now
    spoilt = ops.cross_entropy(probabilities, targets, inplace=True, impl="native")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spoilt.backward()


def test_nothing_to_predict_is_nan_with_a_gradient_of_zero():
    x = torch.randn(2, 3, requires_grad=True)
    loss = ops.linear_cross_entropy(x, torch.randn(5, 3), torch.full((2,), -100), impl="native")
    loss.backward()
    assert loss.isnan()
    assert torch.equal(x.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(("rows", "vocab", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_every_size_may_be_zero(rows, vocab, width):
    x, weight = (torch.zeros(n, width, requires_grad=True) for n in (rows, vocab))
    targets = torch.full((rows,), -100)
    for loss in (
        ops.linear_cross_entropy(x, weight, targets, reduction="sum"),
        ops.cross_entropy(x @ weight.t(), targets, reduction="sum"),
    ):
        assert loss == 0
        assert not any(y.any() for y in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_strided_inputs_are_read(impl):
    *_, targets, _ = example(8, 11, 4)
    wide = torch.randn(11, 8, requires_grad=True)
    weight = torch.randn(4, 30)[:, ::2].t()[:11]
    got = ops.linear_cross_entropy(wide.t()[:, :4], weight, targets, impl=impl)
    exact = F.cross_entropy(F.linear(wide.t()[:, :4].double(), weight.double()), targets)
    torch.testing.assert_close(got.double(), exact)
    logits = ops.cross_entropy(wide.t(), targets, impl=impl)
    torch.testing.assert_close(logits.double(), F.cross_entropy(wide.t().double(), targets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 5])}, "target 5 is outside the vocabulary of 5"),
        ({"targets": torch.tensor([0, -1])}, "target -1 is outside the vocabulary of 5"),
        ({"targets": torch.tensor([0, 1, 2])}, r"targets must be int64 of shape \(2,\)"),
        ({"targets": torch.tensor([0.0, 1.0])}, r"targets must be int64 of shape \(2,\)"),
        ({"x": torch.zeros(2, 2, 3)}, "x must have two dimensions"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \(V, C\) with C = 3"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float64)}, "x and weight must have one dtype"),
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"reduction": "average"}, "reduction must be mean, sum or none"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 4]),
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**(arguments | change))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_registered_ops_are_sound(reduction):
    x, weight, bias, targets, upstream = example(6, 11, 4)
    linear = torch.ops.pygpt.linear_cross_entropy.default
    wanted = [reduction != "none"] * 3
    torch.library.opcheck(
        linear, (x, weight, bias, targets, -100, reduction, torch.float32, wanted)
    )
    logits = torch.randn(6, 11, requires_grad=True)
    torch.library.opcheck(
        torch.ops.pygpt.cross_entropy.default,
        (logits, targets, -100, reduction, reduction != "none"),
    )
    torch.library.opcheck(
        torch.ops.pygpt.cross_entropy_backward.default, (upstream, logits.detach(), targets, -100)
    )
    torch.library.opcheck(
        torch.ops.pygpt.linear_cross_entropy_backward.default,
        (
            upstream,
            *(t.detach() for t in (x, weight, bias)),
            targets,
            -100,
            torch.float32,
            [True, False, True],
        ),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_compiles_without_a_graph_break(reduction):
    *leaves, targets, upstream = example(6, 11, 4)

    def loss(x, weight, bias):
        direct = ops.linear_cross_entropy(x * 2, weight, targets, bias=bias, reduction=reduction)
        return direct + ops.cross_entropy(x @ weight.t(), targets, reduction=reduction)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = results(loss(*leaves), leaves, upstream, reduction)
    for a, b in zip(eager, results(compiled(*leaves), leaves, upstream, reduction), strict=True):
        torch.testing.assert_close(a, b)
