"""The CUDA kernels on a GPU: right, repeatable, on the current stream, inside graphs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pygpt import GPT, GPTConfig, _native, ops, reference
from pygpt.ops.dispatch import MEASURED

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or bool(_native.cuda_info()["why_unusable"]),
        reason=f"no usable GPU: {_native.cuda_info()['why_unusable'] or 'torch sees none'}",
    ),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
names = {"ids": ["fp32", "bf16", "fp16"]}


def tensors(b, t, s, h, h_kv, d, dtype=torch.bfloat16, seed=0):
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random, device="cuda").to(dtype)

    return normal(b, t, h, d), normal(b, s, h_kv, d), normal(b, s, h_kv, d), normal(b, t, h, d)


def with_gradients(q, k, v, dout, impl, dtype=None, **options):
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    out = ops.causal_attention(q, k, v, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def assert_as_accurate_as_torch(q, k, v, dout, **options):
    """Errors against float64 at most twice those of torch's plain attention in the same dtype."""
    exact = with_gradients(q, k, v, dout, "torch", torch.float64, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = with_gradients(q, k, v, dout, "torch", **options)
    ours = with_gradients(q, k, v, dout, "native", **options)
    eps = 2 * torch.finfo(q.dtype).eps * max(float(x.abs().max()) for x in exact)
    for name, mine, theirs, true in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        error, plain_error = ((x.double() - true).abs().max() for x in (mine, theirs))
        assert error <= 2 * plain_error + eps, f"{name}: {error:.3g} against {plain_error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 64),
        (2, 65, 65, 3, 3, 64),
        (1, 130, 300, 4, 2, 128),
        (2, 1024, 1024, 4, 4, 64),
        (1, 2049, 2049, 2, 1, 128),
        (2, 100, 100, 2, 2, 8),
        (2, 200, 333, 6, 2, 104),
        (8, 777, 777, 20, 20, 64),
    ],
    ids=str,
)
def test_attention_is_as_accurate_as_torch(shape, dtype):
    assert_as_accurate_as_torch(*tensors(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("d", [64, 128])
def test_masks(d, dtype):
    b, t, s = 3, 300, 500
    q, k, v, dout = tensors(b, t, s, 4, 2, d, dtype)
    breaks = torch.rand(b, s, device="cuda") < 0.02
    ids = breaks.cumsum(1).int()
    lengths = torch.tensor([500, 301, 120], dtype=torch.int32, device="cuda")
    assert_as_accurate_as_torch(q, k, v, dout, window=77)
    assert_as_accurate_as_torch(q, k, v, dout, document_ids=ids)
    assert_as_accurate_as_torch(q, k, v, dout, document_ids=ids, window=50)
    assert_as_accurate_as_torch(q, k, v, dout, kv_lengths=lengths[:2].repeat(2)[:b].clamp(min=300))
    out = ops.causal_attention(q, k, v, kv_lengths=lengths, impl="native")
    assert not out[2, :180].any()  # queries that stand before the first key
    assert out[2, 180:].any()


@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_views_of_a_fused_projection_equal_contiguous_tensors(dtype):
    joint = torch.randn(2, 150, 3, 4, 64, device="cuda").to(dtype)
    views = joint.unbind(2)
    copies = [x.contiguous() for x in views]
    dout = torch.randn_like(copies[0])
    for a, b in zip(
        with_gradients(*views, dout, "native"), with_gradients(*copies, dout, "native"), strict=True
    ):
        assert torch.equal(a, b)
    odd = torch.randn(2, 150, 4 * 64 + 1, device="cuda").to(dtype)[..., 1:].unflatten(-1, (4, 64))
    assert torch.equal(
        ops.causal_attention(odd, odd, odd, impl="native"),
        ops.causal_attention(*[odd.contiguous()] * 3, impl="native"),
    )


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("d", [64, 128])
def test_dropout_drops_what_the_cpu_drops(d, dtype):
    q, k, v, dout = tensors(2, 150, 170, 4, 2, d, dtype)
    seed = torch.tensor([-123456789012345])
    options = {"dropout_p": 0.3, "seed": seed}
    ours = with_gradients(q, k, v, dout, "native", **options)
    cpu = [x.cpu() for x in (q, k, v, dout)]
    exact = with_gradients(*cpu, "reference", torch.float64, **options)
    for mine, true in zip(ours, exact, strict=True):
        tolerance = 20 * torch.finfo(dtype).eps * float(true.abs().max())
        torch.testing.assert_close(mine.cpu().double(), true, rtol=0, atol=tolerance)
    drawn = [ops.causal_attention(q, k, v, dropout_p=0.3, impl="native") for _ in range(2)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("dtype", DTYPES, **names)
def test_results_repeat_bit_for_bit(dtype):
    inputs = tensors(4, 1000, 1000, 8, 4, 64, dtype)
    first = with_gradients(*inputs, "native", dropout_p=0.1, seed=torch.tensor([5]))
    for _ in range(5):
        again = with_gradients(*inputs, "native", dropout_p=0.1, seed=torch.tensor([5]))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_decoding_equals_the_last_rows_of_the_whole(d, dtype):
    q, k, v, _ = tensors(2, 3000, 3000, 8, 2, d, dtype)
    whole = ops.causal_attention(q, k, v, impl="native")
    for t in (1, 3, 4, 5):  # 4 query heads share the keys: up to 4 tokens go the short way
        part = ops.causal_attention(q[:, -t:], k, v, impl="native")
        torch.testing.assert_close(part, whole[:, -t:], rtol=2e-2, atol=2e-3)
    lengths = torch.tensor([3000, 1234], dtype=torch.int32, device="cuda")
    part = ops.causal_attention(q[:, 1233:1234], k, v, kv_lengths=lengths, impl="native")
    torch.testing.assert_close(part[1], whole[1, 1233:1234], rtol=2e-2, atol=2e-3)


def sampling_inputs(rows, vocab, dtype, seed):
    random = torch.Generator().manual_seed(seed)

    def choose(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=random)]

    logits = (torch.randn(rows, vocab, generator=random) * 4).to(dtype)
    logits[::3] = (logits[::3].float() * 4).round().to(dtype) / 4  # many ties
    return logits, {
        "uniforms": torch.rand(rows, dtype=torch.float64, generator=random),
        "temperature": choose(0.0, 0.7, 1.0, 3.0),
        "top_k": choose(0, 1, 50, 1000),
        "top_p": choose(1.0, 0.95, 0.5, 1e-6),
        "min_p": choose(0.0, 0.02),
        "repetition_penalty": choose(1.0, 1.2),
        "presence_penalty": choose(0.0, 0.5),
        "frequency_penalty": choose(0.0, 0.1),
        "history": torch.randint(-1, vocab, (rows, 40), generator=random),
        "logit_bias": torch.randn(vocab, generator=random),
    }


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("vocab", [1, 33, 50257, 128256])
def test_sampled_tokens_are_those_of_the_cpu(vocab, dtype):
    logits, options = sampling_inputs(64, vocab, dtype, seed=vocab)
    expected = ops.sample(logits, **options, impl="native")
    on_gpu = {k: v.cuda() for k, v in options.items()}
    assert ops.sample(logits.cuda(), **on_gpu, impl="native").tolist() == expected.tolist()


@pytest.mark.parametrize("numbers", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["", "mixed"])
def test_sampling_can_be_captured_in_a_graph(numbers):
    logits, options = sampling_inputs(8, 5000, torch.bfloat16, seed=3)
    logits, on_gpu = logits.cuda(), {k: v.cuda() for k, v in options.items()} | numbers
    eager = ops.sample(logits, **on_gpu, impl="native")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            ops.sample(logits, **on_gpu, impl="native")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = ops.sample(logits, **on_gpu, impl="native")
    tokens.zero_()
    graph.replay()
    assert tokens.tolist() == eager.tolist()


def test_sampling_with_numbers_never_waits_for_the_gpu():
    logits = torch.randn(8, 5000, device="cuda")
    ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, impl="native")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, impl="native")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_row_without_a_choice_gives_no_token():
    logits = torch.zeros(4, 99, device="cuda")
    logits[0, 3], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    assert ops.sample(logits, top_k=5, impl="native")[:3].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES, **names)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction, dtype):
    logits = (torch.randn(37, 50257, device="cuda") * 3).to(dtype)
    targets = torch.randint(50257, (37,), device="cuda")
    targets[5] = -100
    exact = logits.double().requires_grad_()
    true = F.cross_entropy(exact, targets, reduction=reduction)
    weights = torch.rand_like(true)
    true.backward(weights)
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        mine = ops.cross_entropy(
            leaf * 1 if inplace else leaf,
            targets,
            reduction=reduction,
            inplace=inplace,
            impl="native",
        )
        torch.testing.assert_close(mine.double(), true.detach(), rtol=1e-5, atol=1e-5)
        mine.backward(weights.float())
        rtol = 4 * torch.finfo(dtype).eps
        atol = float(exact.grad.abs().max()) * max(rtol / 8, 1e-6)
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("autocast", [False, True])
def test_linear_cross_entropy_and_its_memory(autocast):
    rows, width, vocab = 8192, 256, 50257
    x = torch.randn(rows, width, device="cuda", requires_grad=True)
    weight = (torch.randn(vocab, width, device="cuda") / 16).requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    found = {}
    for impl in ("torch", "native"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = ops.linear_cross_entropy(x, weight, targets, impl=impl)
        found[impl] = [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
        found[impl + " memory"] = torch.cuda.max_memory_allocated() - before
        del loss
    for mine, theirs in zip(found["native"], found["torch"], strict=True):
        scale = float(theirs.abs().max())
        tolerance = scale * (2e-2 if autocast else 2e-3)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    assert found["native memory"] < 1e9 < found["torch memory"]


def test_opcheck():
    q, k, v, _ = tensors(2, 40, 50, 4, 2, 64)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    options = (0.125, 0, None, None, 0.0, None)
    torch.library.opcheck(torch.ops.pygpt.causal_attention, (*inputs, *options))
    logits = torch.randn(3, 100, device="cuda", requires_grad=True)
    targets = torch.tensor([1, 2, -100], device="cuda")
    arguments = (logits, targets, -100, "mean", True)
    torch.library.opcheck(torch.ops.pygpt.cross_entropy, arguments)
    parameters = torch.tensor([[1.0, 5, 0.9, 0, 1, 0, 0]], dtype=torch.float64, device="cuda")
    uniforms = torch.rand(3, dtype=torch.float64, device="cuda")
    arguments = (logits.detach(), uniforms, parameters, None, None)
    torch.library.opcheck(torch.ops.pygpt.sample, arguments)


def test_kernels_run_on_the_current_stream():
    q, k, v, _ = tensors(2, 512, 512, 4, 4, 64)
    expected = ops.causal_attention(q, k, v, impl="native")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = q.clone()
        out = ops.causal_attention(late, k, v, impl="native")
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_gpu_can_be_used():
    q, k, v, dout = tensors(2, 100, 100, 2, 2, 64)
    first = with_gradients(q, k, v, dout, "native")
    second = with_gradients(*(x.to("cuda:1") for x in (q, k, v, dout)), "native")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b.to("cuda:0"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_learns_alike_with_every_backend(compiled):
    config = GPTConfig(
        vocab_size=300, context_length=64, emb_dim=128, n_heads=2, n_layers=2, drop_rate=0.0
    )
    ids = torch.randint(300, (4, 65), device="cuda")
    gradients: dict[str, list[Tensor]] = {}
    for impl in ("torch", "native"):
        torch.manual_seed(0)
        model = GPT(config).cuda()
        with ops.backend(impl), torch.autocast("cuda", torch.bfloat16):
            call = torch.compile(model.loss, backend="aot_eager") if compiled else model.loss
            loss = call(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients[impl] = [loss.detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(gradients["native"], gradients["torch"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-2 * float(b.abs().max()) + 1e-6)


def test_auto_takes_only_what_was_measured():
    capability = torch.cuda.get_device_capability()
    backend, why = ops.chosen_backend("causal_attention", "cuda", torch.bfloat16, 64)
    measured = ("causal_attention", torch.bfloat16, capability) in MEASURED
    assert backend == ("native" if measured else "torch")
    assert why


SMALL = """
import torch
from pygpt import ops
q = torch.randn(2, 70, 4, 64, device="cuda")
for dtype in (torch.float32, torch.bfloat16):
    for d in (40, 64, 128):
        q = torch.randn(2, 70, 4, d, device="cuda").to(dtype).requires_grad_()
        k, v = (torch.randn(2, 90, 2, d, device="cuda").to(dtype).requires_grad_() for _ in "kv")
        ops.causal_attention(q, k, v, window=33, dropout_p=0.1, impl="native").sum().backward()
        ops.causal_attention(q, k, v, impl="native").sum().backward()
        ops.causal_attention(q[:, :1], k, v, impl="native")
logits = torch.randn(3, 1003, device="cuda", requires_grad=True)
ops.sample(logits.detach(), top_k=50, top_p=0.9, impl="native")
ops.cross_entropy(logits, torch.tensor([1, 2, 3], device="cuda"), impl="native").backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-P",
        "-c",
        SMALL,
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(ops.__file__).parents[2])}
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} found nothing in 90 seconds and was not done")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_reference_on_the_cpu_agrees():
    q, k, v, _ = tensors(1, 30, 40, 2, 1, 64, torch.float32)
    ours = ops.causal_attention(q, k, v, impl="native").cpu()
    true = reference.causal_attention(*(x.cpu() for x in (q, k, v)), 0.125)
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)
