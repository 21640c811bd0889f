"""Causal attention: right on every shape and mask, as accurate as torch, and a proper torch op."""

import os
import random
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from pygpt import _native, ops, reference
from pygpt.cli.display import header
from pygpt.ops import dispatch

SOAK = int(os.environ.get("PYGPT_SOAK", "1"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
names = {"ids": lambda x: str(x).removeprefix("torch.")}


def tensors(b, t, s, h, h_kv, d, dtype=torch.float32, seed=0):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, t, h, d), (b, s, h_kv, d), (b, s, h_kv, d), (b, t, h, d)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_gradients(q, k, v, dout, dtype, **options):
    """out, dq, dk, dv computed in `dtype`, as float64."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out = ops.causal_attention(*inputs, **options)
    gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
    return [x.detach().double() for x in (out, *gradients)]


def rounding_of_summands(q, k, v, dout, window=None, document_ids=None, kv_lengths=None):
    """What out, dq, dk, dv lose to one rounding of every score, dout v and delta = sum(dout out).

    Where a sum cancels, or has one term, the naive error is one lucky draw, at times zero.
    """
    eps, eps_out = torch.finfo(torch.float32).eps, torch.finfo(q.dtype).eps
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    seen = reference.visible_keys(q.shape[1], k.shape[1], window, document_ids, kv_lengths, "cpu")
    score = torch.einsum("bthd,bshd->bhts", q, keys) * scale
    p = score.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    dp = torch.einsum("bthd,bshd->bhts", dout, values)
    delta = (p * dp).sum(-1, keepdim=True)
    p_loss = eps * p * (1 + score.abs())
    ds_loss = p * (eps * (dp.abs() + score.abs() * (dp - delta).abs()) + eps_out * delta.abs())
    ds_loss *= scale
    return (
        torch.einsum("bhts,bshd->bthd", p_loss, values.abs()),
        torch.einsum("bhts,bshd->bthd", ds_loss, keys.abs()),
        torch.einsum("bhts,bthd->bshd", ds_loss, q.abs()).unflatten(2, (-1, group)).sum(3),
        torch.einsum("bhts,bthd->bshd", p_loss, dout.abs()).unflatten(2, (-1, group)).sum(3),
    )


def assert_as_accurate_as_torch(q, k, v, dout, **masks):
    exact = with_gradients(q, k, v, dout, torch.float64, impl="reference", **masks)
    ours = with_gradients(q, k, v, dout, q.dtype, impl="native", **masks)
    torchs = with_gradients(q, k, v, dout, q.dtype, impl="torch", **masks)
    summands = rounding_of_summands(q, k, v, dout, **masks)
    # Gradients keep the float32 rounding of what cancels in them, or of one weight that is 1.
    left = 2 * torch.finfo(torch.float32).eps * max(x.abs().max() for x in exact)
    results = zip(("out", "dq", "dk", "dv"), exact, ours, torchs, summands, strict=True)
    for name, e, o, t, least in results:
        last_place = 2 * torch.finfo(q.dtype).eps * e.abs().max()
        floor = torch.maximum(least, left * (name != "out") + last_place)
        error, naive = (o - e).abs(), (t - e).abs().max()
        assert (error <= 2 * naive + floor).all(), (
            f"{name}: error {error.max():.2e}, torch's {naive:.2e}, floor {floor.min():.2e} to "
            f"{floor.max():.2e}"
        )


def random_masks(rng, b, t, s):
    masks = {}
    if rng.random() < 0.3:
        masks["window"] = rng.choice([1, 5, 40, 200])
    if rng.random() < 0.3:
        masks["document_ids"] = torch.randint(0, 5, (b, s)).sort(1).values.int()
    if rng.random() < 0.3:
        masks["kv_lengths"] = torch.randint(0, s + 1, (b,)).int()
    return masks


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("seed", range(67 * SOAK))
def test_random_shapes(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    b, h_kv, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 4])
    d = rng.choice([8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 200, 256])
    t = rng.choice([1, 2, 3, 7, 16, 33, 48, 64, 100, 130])
    s = t + rng.choice([0, 0, 0, 1, 5, 64, 200])
    inputs = tensors(b, t, s, h_kv * group, h_kv, d, dtype, seed)
    assert_as_accurate_as_torch(*inputs, **random_masks(rng, b, t, s))


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("shape", [(1, 1100, 1100, 2, 1, 64), (1, 9, 2100, 2, 2, 64)])
def test_several_blocks_of_keys(shape, dtype):
    assert_as_accurate_as_torch(*tensors(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("seed", range(12 * SOAK))
def test_decoding_shapes_with_the_heads_of_a_key_or_the_keys_of_a_head_together(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    b, h_kv, (t, group) = (
        rng.choice([1, 2]),
        rng.choice([1, 2, 5]),
        rng.choice([(1, 1), (1, 4), (2, 3)]),
    )
    d, s = rng.choice([8, 16, 24, 64, 72, 80, 128, 256]), rng.choice([3, 100, 129, 600, 1300])
    q, k, v, dout = tensors(b, t, s, h_kv * group, h_kv, d, dtype, seed)
    masks = random_masks(rng, b, t, s)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for keys, values in ((k, v), heads_first):
        assert_as_accurate_as_torch(q, keys, values, dout, **masks)


@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_large_and_growing_scores(dtype):
    q, k, v, dout = tensors(1, 700, 700, 1, 1, 64, dtype)
    k = k * torch.linspace(0.1, 30, 700)[:, None, None].to(dtype)  # the maximum keeps moving
    assert_as_accurate_as_torch(q, k, v, dout)


@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_views_of_a_fused_projection_equal_contiguous_tensors(dtype):
    qkv = torch.randn(2, 50, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = qkv.unbind(2)
    dout = torch.randn(2, 4, 50, 32).to(dtype).transpose(1, 2)
    ours = with_gradients(*views, dout, dtype, impl="native")
    copies = [x.contiguous() for x in (*views, dout)]
    for a, b in zip(ours, with_gradients(*copies, dtype, impl="native"), strict=True):
        assert torch.equal(a, b)


def test_odd_strides_and_a_strided_last_dimension():
    buffer = torch.randn(2, 20, 3, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    odd = buffer[..., 1:]
    strided = buffer[..., 1:].transpose(2, 3).contiguous().transpose(2, 3)
    expected = ops.causal_attention(*[odd.contiguous()] * 3, impl="native").float()
    for x in (odd, strided):
        got = ops.causal_attention(x, x, x, impl="native").float()
        assert (got - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_query_without_keys_gives_zeros_and_no_gradient():
    q, k, v, dout = tensors(2, 4, 6, 2, 2, 16)
    lengths = torch.tensor([0, 2], dtype=torch.int32)
    for impl in ("native", "torch", "reference"):
        out, dq, dk, dv = with_gradients(
            q, k, v, dout, torch.float32, kv_lengths=lengths, impl=impl
        )
        assert out[0].abs().max() == 0 and out[1, :2].abs().max() == 0
        assert dq[0].abs().max() == 0 and dk[0].abs().max() == 0 and dv[:, 2:].abs().max() == 0
        assert out[1, 2:].abs().min() > 0


@pytest.mark.parametrize("t", [3, 12])
def test_memory_beyond_what_is_visible_is_never_read(t):
    q, k, v, dout = tensors(1, t, 40, 2, 2, 16)
    lengths = torch.tensor([17], dtype=torch.int32)
    options = {"dtype": torch.float32, "impl": "native"}
    expected = with_gradients(q, k[:, :17], v[:, :17], dout, **options)
    k[:, 17:], v[:, 17:] = float("nan"), float("nan")
    got = with_gradients(q, k, v, dout, kv_lengths=lengths, **options)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[:, : y.shape[1]], y) and not x[:, y.shape[1] :].any()


def test_nan_reaches_every_query_that_sees_it_and_no_other():
    q, k, v, _ = tensors(1, 40, 40, 1, 1, 16)
    k[0, 20] = float("nan")
    finite = ops.causal_attention(q, k, v, impl="native").isfinite().all(-1)[0, :, 0]
    assert finite[:20].all() and not finite[20:].any()


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 2, 16), (2, 0, 0, 2, 2, 16), (2, 0, 5, 2, 2, 16)])
def test_empty_tensors(shape):
    q, k, v, dout = tensors(*shape)
    out, dq, dk, _ = with_gradients(q, k, v, dout, torch.float32, impl="native")
    assert out.shape == q.shape and dq.shape == q.shape and not dk.any()


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 300, 300, 4, 2, 64),
        (1, 1500, 1500, 1, 1, 32),
        (1, 1, 3000, 2, 1, 64),
        (2, 1, 3000, 4, 2, 64),
    ],
)
def test_results_do_not_depend_on_threads_or_repetition(shape, dtype):
    inputs = tensors(*shape, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(with_gradients(*inputs, dtype, impl="native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_of_a_batch_do_not_touch_each_other():
    q, k, v, _ = tensors(3, 20, 30, 2, 2, 16)
    together = ops.causal_attention(q, k, v, impl="native")
    for b in range(3):
        alone = ops.causal_attention(*(x[b : b + 1] for x in (q, k, v)), impl="native")
        assert torch.equal(alone[0], together[b])


def test_cached_decoding_gives_the_last_rows_of_the_whole():
    q, k, v, _ = tensors(1, 50, 50, 2, 2, 32)
    whole = ops.causal_attention(q, k, v, impl="native")
    for t in (1, 3):
        tail = ops.causal_attention(q[:, -t:], k, v, impl="native")
        torch.testing.assert_close(tail, whole[:, -t:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("shape", [(2, 37, 150, 4, 2, 24), (1, 1, 70, 2, 1, 64)])
def test_dropout_drops_what_the_reference_drops(shape, dtype):
    q, k, v, dout = tensors(*shape, dtype)
    seed = torch.tensor([-(2**62) + 12345])
    options = {"dropout_p": 0.3, "seed": seed, "window": 90}
    exact = with_gradients(q, k, v, dout, torch.float64, impl="reference", **options)
    ours = with_gradients(q, k, v, dout, dtype, impl="native", **options)
    for e, o in zip(exact, ours, strict=True):
        assert (o - e).abs().max() <= 8 * torch.finfo(dtype).eps * e.abs().max()
    again = ops.causal_attention(q, k, v, **{**options, "seed": seed + 1})
    assert not torch.equal(again.double(), ours[0])


def test_dropout_draws_its_seed_from_torch():
    q, k, v, _ = tensors(1, 30, 30, 2, 2, 16)
    torch.manual_seed(3)
    first, second = (ops.causal_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ops.causal_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_gradcheck_of_the_reference_and_torch_paths():
    q, k, v = (x.double().requires_grad_() for x in tensors(1, 5, 7, 2, 1, 8)[:3])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    for impl in ("reference", "auto"):
        assert torch.autograd.gradcheck(
            lambda *x, impl=impl: ops.causal_attention(
                *x, window=3, document_ids=documents, impl=impl
            ),
            (q, k, v),
        )


@pytest.mark.parametrize("masks", [False, True])
def test_opcheck(masks):
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 6, 9, 4, 2, 16))
    documents = torch.zeros(2, 9, dtype=torch.int32) if masks else None
    lengths = torch.tensor([9, 7], dtype=torch.int32) if masks else None
    arguments = (q, k, v, 0.25, 4 if masks else 0, documents, lengths, 0.0, None)
    opcheck(torch.ops.pygpt.causal_attention.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.pygpt.causal_attention(*arguments)
    arguments = (torch.ones_like(out), *(x.detach() for x in (q, k, v)), out, lse, *arguments[3:])
    opcheck(torch.ops.pygpt.causal_attention_backward.default, arguments)


@pytest.mark.parametrize("options", [{}, {"window": 4, "dropout_p": 0.2}, {"kv_lengths": (5, 9)}])
def test_a_call_past_torchs_dispatcher_gives_what_the_op_gives(options):
    q, k, v, dout = tensors(2, 6, 9, 4, 2, 16)
    seed = torch.tensor([7])
    if lengths := options.get("kv_lengths"):
        options = {"kv_lengths": torch.tensor(lengths, dtype=torch.int32)}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    direct = ops.causal_attention(*inputs, **options, seed=seed, impl="native")
    window, lengths, p = (options.get(name) for name in ("window", "kv_lengths", "dropout_p"))
    seen = torch.ops.pygpt.causal_attention(*inputs, 0.25, window or 0, None, lengths, p or 0, seed)
    assert torch.equal(direct, seen[0])
    pairs = zip(*(torch.autograd.grad(out, inputs, dout) for out in (direct, seen[0])), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with torch.no_grad():
        alone = ops.causal_attention(*inputs, **options, seed=seed, impl="native")
    assert torch.equal(alone, direct) and not alone.requires_grad


def test_tracers_and_transforms_see_the_op():
    q, k, v, _ = tensors(1, 6, 6, 2, 2, 16)

    def native(q):
        return ops.causal_attention(q, k, v, impl="native")

    graph = make_fx(native)(q).graph
    assert any(node.target == torch.ops.pygpt.causal_attention.default for node in graph.nodes)
    assert torch.equal(torch.func.functionalize(native)(q), native(q))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(native, (q,))
    assert torch.equal(traced(q + 1), native(q + 1))


def test_second_derivatives_are_refused():
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 4, 4, 1, 1, 8))
    out = ops.causal_attention(q, k, v, impl="native")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(dq.sum(), q)


def test_autocast_casts_as_torch_does():
    q, k, v, dout = tensors(1, 20, 20, 2, 2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.causal_attention(q, k, v)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, ops.causal_attention(*(x.bfloat16() for x in (q, k, v))))
        assert ops.causal_attention(q.double(), k.double(), v.double()).dtype == torch.float64
        (dq, *_) = with_gradients(q, k, v, dout.bfloat16(), torch.float32)
    assert dq.dtype == torch.float64


def test_compiled_equals_eager():
    def f(q, k, v):
        return (ops.causal_attention(q, k, v, window=7) * 2).sum()

    inputs = [x.requires_grad_() for x in tensors(1, 20, 20, 2, 2, 16)[:3]]
    expected = torch.autograd.grad(f(*inputs), inputs)
    got = torch.autograd.grad(
        torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), inputs
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_what_has_no_kernel_goes_through_torch_or_is_refused():
    q, k, v, _ = tensors(1, 5, 5, 1, 1, 12)
    expected = reference.causal_attention(q, k, v, 12**-0.5)
    torch.testing.assert_close(ops.causal_attention(q, k, v), expected)
    with pytest.raises(ValueError, match="head dimension 12"):
        ops.causal_attention(q, k, v, impl="native")
    q, k, v, _ = tensors(1, 5, 5, 1, 1, 16, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        ops.causal_attention(q, k, v, impl="native")


def test_chosen_backend_says_why():
    isa = _native.isa()
    assert ops.chosen_backend("causal_attention", "cpu", torch.float32, 64) == (
        "native",
        f"{isa} kernels",
    )
    assert ops.chosen_backend("causal_attention", "cpu", torch.float32, 65)[0] == "torch"
    assert ops.chosen_backend("causal_attention", "cuda", torch.float32)[0] == "torch"
    assert ops.chosen_backend("sample", "cpu", torch.float32)[0] == "native"
    with ops.backend("reference"):
        assert ops.chosen_backend("sample", "cpu", torch.float32)[0] == "reference"
    with pytest.raises(ValueError, match="op must name"):
        ops.chosen_backend("softmax", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("problem", "capability", "said"),
    [
        ("the driver supports CUDA 12, this build needs 13: update the driver", (9, 0), "update"),
        ("", (7, 5), "sm_75; the kernels need sm_80"),
        ("", (10, 0), "no kernel image"),
        ("", (9, 0), "has not been measured"),
    ],
)
def test_a_runs_header_and_the_chosen_backend_name_what_is_wrong_with_a_gpu(
    monkeypatch, problem, capability, said
):
    monkeypatch.setattr(dispatch, "_cuda_info", lambda: {"why_unusable": problem})
    other = "CUDA: no kernel image is available" if capability == (10, 0) else ""
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: other)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    device = torch.device("cuda")
    backend, why = ops.chosen_backend("causal_attention", device, torch.bfloat16, 64)
    assert backend == "torch" and said in why
    line = header(device, torch.bfloat16, 64)
    assert line.startswith("A GPU") and said in line


def test_what_was_measured_on_a_gpu_is_chosen_there(monkeypatch):
    monkeypatch.setattr(dispatch, "_cuda_info", lambda: {"why_unusable": ""})
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    entry = ("sample", torch.bfloat16, (9, 0))
    monkeypatch.setitem(dispatch.MEASURED, entry, "one day on an H100")
    assert ops.chosen_backend("sample", "cuda", torch.bfloat16) == (
        "native",
        "measured one day on an H100",
    )
    assert ops.chosen_backend("sample", "cuda", torch.float32)[0] == "torch"
    assert ops.chosen_backend("causal_attention", "cuda", torch.bfloat16)[0] == "torch"


def test_backend_context_forces_the_path():
    q, k, v, _ = tensors(1, 30, 30, 1, 1, 16)
    with ops.backend("reference"):
        assert torch.equal(ops.causal_attention(q, k, v), reference.causal_attention(q, k, v, 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 3, 16)}, "H a multiple of H_kv"),
        ({"q": torch.zeros(1, 7, 2, 16)}, "S >= T"),
        ({"q": torch.zeros(4, 2, 16)}, r"q must be \(B, T, H, D\)"),
        ({"v": torch.zeros(1, 5, 2, 16)}, r"q must be \(B, T, H, D\)"),
        ({"k": torch.zeros(1, 6, 2, 16).half()}, "one dtype"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": float("nan")}, "scale must be positive"),
        ({"window": 0}, "window must be at least 1"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"document_ids": torch.zeros(1, 6)}, "document_ids must be torch.int32"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int32)}, r"of shape \(1,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v, _ = tensors(1, 4, 6, 2, 2, 16)
    with pytest.raises(ValueError, match=message):
        ops.causal_attention(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize(("device", "message"), [("cpu", "no memory"), ("meta", "meta")])
def test_the_binding_refuses_tensors_without_memory(device, message):
    x = torch.empty(1, 1, 1, 8, device=device)
    if device == "cpu":
        x.untyped_storage().resize_(0)
    assert not _native.attention_fits(x, x, x, None, None, None, None, 0.0, None)
    with pytest.raises((ValueError, RuntimeError), match=message):
        _native.attention_forward(x, x, x, 1.0, 0, None, None, 0.0, None, None)
