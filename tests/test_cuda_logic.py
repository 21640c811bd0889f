"""The CUDA kernels' source, run on the CPU: tests/cuda_emulator stands in for the GPU.

Held against float64 twins written here from the definitions, on shapes that cross every tile edge.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pygpt import GPT, GPTConfig, _native, ops
from pygpt.ops import attention, linear_loss, loss, sampling

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
NAMES = ("out", "dq", "dk", "dv")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


KINDS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "I": ctypes.c_uint32,
    "f": ctypes.c_float,
}


def struct(name: str, fields: str) -> Any:
    """A struct of csrc's headers: "name:kind", with p a pointer and the struct module's letters."""
    pairs = (field.split(":") for field in fields.split())
    kinds = [(field, KINDS[kind]) for field, kind in pairs]
    return type(name, (ctypes.Structure,), {"_fields_": kinds})


Pointers = KINDS["t"] = struct("CudaTensor", "data:p batch:q token:q head:q")
Attention = struct(
    "CudaAttention",
    "q:t k:t v:t out:t lse:p batches:i queries:i keys:i heads:i kv_heads:i channels:i dtype:i "
    "scale:f window:i document_starts:p kv_lengths:p dropout_threshold:I kept_scale:f seed:p",
)
Gradient = struct("CudaAttentionGradient", "dout:t dq:t dk:t dv:t delta:p")
Sample = struct(
    "SampleArgs",
    "logits:p dtype:i rows:q vocab:q logits_stride:q parameters:p parameters_stride:q uniforms:p "
    "bias:p bias_stride:q history:p history_length:q tokens:p",
)
CrossEntropy = struct(
    "CudaCrossEntropy",
    "logits:p dtype:i rows:q vocab:q logits_stride:q targets:p ignore_index:q losses:p row_scale:p "
    "row_scale_stride:q",
)


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    """csrc/cuda compiled for the CPU; kept in build/, under the hash of its sources."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulator with")
    pybind11 = pytest.importorskip("pybind11")
    kernels = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.name != "device.cu")
    mine = ROOT / "tests/cuda_emulator"
    sources = [*kernels, mine / "entry.cpp", mine / "module.cpp", ROOT / "csrc/bindings_cuda.cpp"]
    headers = [p for folder in ("csrc", "tests/cuda_emulator") for p in (ROOT / folder).rglob("*h")]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources + sorted(headers)))
    folder = ROOT / "build" / f"cuda_emulator-{digest.hexdigest()[:16]}"
    library = folder / "emulator.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        python = [sysconfig.get_path("include"), pybind11.get_include()]
        includes = [f"-I{folder}" for folder in (mine, ROOT / "csrc", *python)]

        def build(source: Path) -> str:
            target = folder / f"{source.name}.{os.getpid()}.o"
            subprocess.run(
                [compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target)],
                check=True,
            )
            return str(target)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(build, sources))
        fresh = folder / f"emulator.{os.getpid()}.so"
        subprocess.run([compiler, "-shared", "-o", str(fresh), *objects], check=True)
        fresh.rename(library)
    return ctypes.CDLL(str(library))


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


@pytest.fixture
def gpu(emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes pygpt's Python for GPUs run the emulated kernels, through the real bindings."""
    loader = importlib.machinery.ExtensionFileLoader("emulator", emulator._name)
    spec = importlib.util.spec_from_loader("emulator", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    for name in ("attention_splits", "attention_forward", "attention_decode"):
        monkeypatch.setattr(_native, f"cuda_{name}", getattr(module, f"cuda_{name}"))
    for name in ("attention_backward", "sample", "cross_entropy"):
        monkeypatch.setattr(_native, f"cuda_{name}", getattr(module, f"cuda_{name}"))
    for room in (attention, loss, sampling):
        monkeypatch.setattr(room, "launch", lambda x: (0, 0))
    emulator.emulated_order(0)


@dataclass
class Case:
    queries: int
    keys: int
    channels: int = 64
    batches: int = 1
    heads: int = 1
    kv_heads: int = 1
    window: int = 0
    documents: bool = False
    lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    fused: bool = False  # q, k and v as views of one projection

    def __str__(self) -> str:
        default = Case(0, 0)
        return "-".join(
            f"{key}={value}" for key, value in vars(self).items() if value != getattr(default, key)
        )


def philox_words(seed: int, case: Case) -> Tensor:
    """(B, H, T, S) words, from the paper's definition."""
    shape = (case.batches, case.heads, case.queries, case.keys)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    counter = [j // 4, i, h, b]
    low, high = seed & 0xFFFFFFFF, seed >> 32
    mask = 0xFFFFFFFF

    def product(x: int, y: Tensor) -> tuple[Tensor, Tensor]:  # high and low words, without overflow
        low_part = (x & 0xFFFF) * y
        high_part = (x >> 16) * y + (low_part >> 16)
        return high_part >> 16, (high_part << 16 | low_part & 0xFFFF) & mask

    for _ in range(10):
        high0, low0 = product(0xD2511F53, counter[0])
        high1, low1 = product(0xCD9E8D57, counter[2])
        counter = [high1 ^ counter[1] ^ low, low1, high0 ^ counter[3] ^ high, low0]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return torch.stack(counter, -1).gather(-1, (j % 4)[..., None])[..., 0]


@dataclass
class Inputs:
    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    seed: Tensor
    document_ids: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None

    @property
    def scale(self) -> float:
        return self.case.scale or 1 / math.sqrt(self.case.channels)

    def exact(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """out, dq, dk, dv in the precision of `dtype`, from the definition."""
        c = self.case
        q, k, v = (x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        group = c.heads // c.kv_heads
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) * self.scale
        lengths = torch.full((c.batches,), c.keys) if self.lengths is None else self.lengths.long()
        position = (lengths[:, None] - c.queries + torch.arange(c.queries))[:, :, None]
        key = torch.arange(c.keys)
        seen = key <= position
        if c.window:
            seen = seen & (key > position - c.window)
        if self.document_ids is not None:
            ids = self.document_ids.long()
            mine = ids.gather(1, position[..., 0].clamp(min=0))
            seen = seen & (mine[..., None] == ids[:, None])
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        p = torch.softmax(scores, -1).masked_fill(~seen[:, None], 0.0).nan_to_num()
        if c.dropout_p:
            threshold = int(c.dropout_p * 2**32)
            kept = philox_words(int(self.seed), c) >= threshold
            p = p * kept / (1 - c.dropout_p)
        out = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(group, 2))
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.dout.to(dtype))]


def make_inputs(case: Case, dtype: torch.dtype, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    c = case

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    if c.fused:
        joint = normal(c.batches, c.keys, c.heads + 2 * c.kv_heads, c.channels)
        q, k, v = joint.split([c.heads, c.kv_heads, c.kv_heads], 2)
        q = q[:, c.keys - c.queries :]
    else:
        q = normal(c.batches, c.queries, c.heads, c.channels)
        k = normal(c.batches, c.keys, c.kv_heads, c.channels)
        v = normal(c.batches, c.keys, c.kv_heads, c.channels)
    ids = starts = None
    if c.documents:
        breaks = torch.rand((c.batches, c.keys), generator=random) < 0.04
        ids = breaks.cumsum(1).int()
        starts = torch.searchsorted(ids, ids, out_int32=True)
    return Inputs(
        case,
        q,
        k,
        v,
        normal(c.batches, c.queries, c.heads, c.channels),
        torch.tensor([0x1234567890ABCDEF + seed]),
        ids,
        starts,
        None if c.lengths is None else torch.tensor(c.lengths, dtype=torch.int32),
    )


def pointers(x: Tensor) -> Pointers:
    return Pointers(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def optional(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def attention_struct(inputs: Inputs, out: Tensor, lse: Tensor) -> Attention:
    c = inputs.case
    return Attention(
        *(pointers(x) for x in (inputs.q, inputs.k, inputs.v, out)),
        lse.data_ptr(),
        c.batches,
        c.queries,
        c.keys,
        c.heads,
        c.kv_heads,
        c.channels,
        DTYPES.index(inputs.q.dtype),
        inputs.scale,
        c.window,
        optional(inputs.starts),
        optional(inputs.lengths),
        int(c.dropout_p * 2**32),
        1 / (1 - c.dropout_p),
        inputs.seed.data_ptr(),
    )


def run(emulator: ctypes.CDLL, inputs: Inputs, *, backward: bool, order: int = 0) -> list[Tensor]:
    """out and, with backward, dq, dk, dv as the kernels compute them; poisoned beforehand."""
    emulator.emulated_order(order)
    c = inputs.case
    out = torch.full_like(inputs.dout, math.nan)
    lse = torch.full((c.batches, c.heads, c.queries), math.nan)
    arguments = attention_struct(inputs, out, lse)
    emulator.emulated_attention_forward(ctypes.byref(arguments))
    if not backward:
        return [out]
    delta = torch.full_like(lse, math.nan)
    grads = [torch.full_like(x, math.nan).contiguous() for x in (inputs.q, inputs.k, inputs.v)]
    gradient = Gradient(*(pointers(x) for x in (inputs.dout, *grads)), delta.data_ptr())
    emulator.emulated_attention_backward(ctypes.byref(arguments), ctypes.byref(gradient))
    return [out, *grads]


def assert_close(results: list[Tensor], inputs: Inputs) -> None:
    """Each error at most twice that of the plain definition in the same dtype, plus rounding."""
    dtype = results[0].dtype
    exact = inputs.exact()
    naive = inputs.exact(dtype)
    for name, ours, plain, true in zip(NAMES, results, naive, exact, strict=False):
        error = (ours.double() - true).abs().max()
        plain_error = (plain.double() - true).abs().max()
        eps = 2 * torch.finfo(dtype).eps * max(float(x.abs().max()) for x in exact)
        assert error <= 2 * plain_error + eps, f"{name}: {error:.3g} against {plain_error:.3g}"


CASES = [
    Case(1, 1),
    Case(7, 7, channels=8),
    Case(64, 64),
    Case(65, 65, channels=64, heads=3),
    Case(130, 130, batches=2, heads=4, kv_heads=2),
    Case(200, 200, channels=128),
    Case(40, 40, channels=128),
    Case(33, 150, channels=96, heads=4, kv_heads=1),
    Case(70, 70, channels=40, fused=True, heads=2, kv_heads=2),
    Case(150, 150, window=17, heads=2),
    Case(150, 200, window=100, channels=128),
    Case(160, 160, documents=True, batches=2, heads=2),
    Case(140, 170, documents=True, window=40, channels=72),
    Case(40, 140, batches=3, lengths=(140, 77, 20), heads=2, kv_heads=1),
    Case(100, 100, scale=0.5, channels=120),
    Case(70, 100, dropout_p=0.3, batches=2, heads=4, kv_heads=2),
    Case(70, 80, dropout_p=0.1, channels=128, window=50),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_gradient_match_the_definition(
    emulator: ctypes.CDLL, case: Case, dtype: torch.dtype
) -> None:
    inputs = make_inputs(case, dtype, seed=case.queries)
    assert_close(run(emulator, inputs, backward=True), inputs)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_no_result_depends_on_which_thread_runs_first(
    emulator: ctypes.CDLL, dtype: torch.dtype, order: int
) -> None:
    inputs = make_inputs(Case(70, 140, window=90, dropout_p=0.2, channels=128), dtype, seed=1)
    first = run(emulator, inputs, backward=True)
    for one, other in zip(first, run(emulator, inputs, backward=True, order=order), strict=True):
        assert torch.equal(one, other)


def test_tiles_are_skipped_and_masked_by_ranges_that_match_the_definition(
    emulator: ctypes.CDLL,
) -> None:
    assert emulator.emulated_range_errors(6) == 0


def test_swizzled_tiles_hold_every_chunk_once_without_bank_conflicts(
    emulator: ctypes.CDLL,
) -> None:
    assert emulator.emulated_tile_errors() == 0


def test_philox_gives_the_published_words() -> None:
    assert [hex(int(w)) for w in philox_words(0, Case(1, 4))[0, 0, 0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


DECODE_CASES = [
    Case(1, 1),
    Case(1, 777, batches=2, heads=3, kv_heads=3),
    Case(1, 600, heads=4, kv_heads=1, channels=128),
    Case(3, 520, heads=4, kv_heads=2, batches=2, channels=72),
    Case(1, 600, window=33),
    Case(4, 700, documents=True),
    Case(2, 600, batches=3, lengths=(600, 300, 1), heads=2, kv_heads=1),
]


@pytest.mark.parametrize("splits", [0, 1, 5], ids=["chosen", "one", "five"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decoding_merges_its_parts_to_the_definition(
    emulator: ctypes.CDLL, case: Case, dtype: torch.dtype, splits: int
) -> None:
    inputs = make_inputs(case, dtype, seed=case.keys)
    out = torch.full_like(inputs.dout, math.nan)
    lse = torch.full((case.batches, case.heads, case.queries), math.nan)
    arguments = attention_struct(inputs, out, lse)
    splits = splits or emulator.emulated_attention_splits(ctypes.byref(arguments))
    assert splits > 0
    workspace = torch.full((splits * out.numel() // case.channels * (case.channels + 2),), math.nan)
    results = []
    for order in range(3):
        emulator.emulated_order(order)
        out.fill_(math.nan)
        emulator.emulated_attention_decode(
            ctypes.byref(arguments), splits, ctypes.c_void_p(workspace.data_ptr())
        )
        results.append(out.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_close(results[:1], inputs)
    decoded = lse.clone()
    emulator.emulated_attention_forward(ctypes.byref(arguments))
    torch.testing.assert_close(decoded, lse, rtol=1e-5, atol=1e-4)


def sample_tokens(
    emulator: ctypes.CDLL,
    logits: Tensor,
    parameters: Tensor,
    uniforms: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.full((rows,), -7)
    keys = torch.full((rows, vocab), -7, dtype=torch.int32)
    arguments = Sample(
        logits.data_ptr(),
        DTYPES.index(logits.dtype),
        rows,
        vocab,
        logits.stride(0),
        parameters.data_ptr(),
        1,
        uniforms.data_ptr(),
        optional(bias),
        0 if bias is None else bias.stride(0),
        optional(history),
        0 if history is None else history.shape[1],
        tokens.data_ptr(),
    )
    emulator.emulated_sample(ctypes.byref(arguments), ctypes.c_void_p(keys.data_ptr()))
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 50, 3000])
def test_sampled_tokens_are_those_of_the_cpu(
    emulator: ctypes.CDLL, vocab: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(vocab)
    choices = [
        [0.0, 0.7, 1.0, 5.0],  # temperature
        [0, 1, 7, 40, vocab],  # top_k
        [1.0, 0.9, 0.3, 1e-9],  # top_p
        [0.0, 0.05],  # min_p
        [1.0, 1.3],  # repetition
        [0.0, 0.4],  # presence
        [0.0, 0.2],  # frequency
    ]
    rows = 24
    parameters = torch.stack(
        [
            torch.tensor(values, dtype=torch.float64)[
                torch.randint(len(values), (rows,), generator=random)
            ]
            for values in choices
        ],
        1,
    )
    logits = (torch.randn(rows, vocab, generator=random) * 3).to(dtype)
    logits[::3] = (logits[::3].float() * 2).round().to(dtype) / 2  # many ties
    uniforms = torch.rand(rows, dtype=torch.float64, generator=random)
    bias = torch.randn(rows, vocab, generator=random)
    history = torch.randint(-1, vocab, (rows, 9), generator=random)
    emulator.emulated_order(DTYPES.index(dtype))  # each dtype in another order
    for with_extras in (False, True):
        extras = (bias, history) if with_extras else (None, None)
        expected = torch.ops.pygpt.sample(logits, uniforms, parameters, *extras)
        tokens = sample_tokens(emulator, logits, parameters, uniforms, *extras)
        assert tokens.tolist() == expected.tolist()


def test_a_row_without_a_choice_gives_no_token(emulator: ctypes.CDLL) -> None:
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    parameters = torch.tensor([[1.0, 3, 0.9, 0, 1, 0, 0]], dtype=torch.float64).repeat(4, 1)
    uniforms = torch.zeros(4, dtype=torch.float64)
    tokens = sample_tokens(emulator, logits, parameters, uniforms, None, None)
    assert tokens.tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 5, 1003, 5000])
def test_cross_entropy_and_its_gradient_match_the_definition(
    emulator: ctypes.CDLL, vocab: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(vocab)
    rows = 5
    logits = (torch.randn(rows, vocab + 3, generator=random) * 4).to(dtype)[:, 1 : vocab + 1]
    if vocab > 5:
        logits[1, 2:4] = -math.inf
    targets = torch.randint(vocab, (rows,), generator=random)
    targets[1], targets[2] = 0, -100
    scales = torch.rand(rows, generator=random)
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (losses * scales).sum().backward()
    found = torch.full((rows,), math.nan)
    arguments = CrossEntropy(
        logits.data_ptr(),
        DTYPES.index(dtype),
        rows,
        vocab,
        logits.stride(0),
        targets.data_ptr(),
        -100,
        found.data_ptr(),
        None,
        1,
    )
    before = logits.clone()
    emulator.emulated_order(DTYPES.index(dtype))
    for scale in (None, scales.data_ptr()):
        arguments.row_scale = scale
        emulator.emulated_cross_entropy(ctypes.byref(arguments))
        torch.testing.assert_close(found, losses.float(), rtol=2e-6, atol=2e-6)
        if scale is None:
            assert torch.equal(logits, before)
    rtol = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("impl", ["native", "torch"])
def test_every_op_of_a_model_has_a_path_where_tensors_are_not_the_cpus(
    monkeypatch: pytest.MonkeyPatch, impl: ops.Impl, tied: bool, drop_rate: float
) -> None:
    """Tensors without data take the Python that a GPU's would, down to the registered fakes."""
    for module in (attention, linear_loss):
        monkeypatch.setattr(module, "why_no_kernel", lambda *kind: "")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    config = GPTConfig(
        vocab_size=300,
        context_length=64,
        emb_dim=128,
        n_heads=2,
        n_layers=2,
        drop_rate=drop_rate,
        tie_weights=tied,
    )
    with torch.device("meta"):
        model = GPT(config)
        ids = torch.zeros(4, 64, dtype=torch.int64)
    with ops.backend(impl):
        loss = model.loss(ids, ids)
    loss.backward()
    assert loss.is_meta and all(p.grad is not None for p in model.parameters())


def on_gpu(x: Tensor | None) -> Any:
    return None if x is None else x.as_subclass(OnGpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (70, {}),
        (3, {}),
        (1, {"odd": True}),
        (70, {"window": 20, "odd": True}),
        (70, {"documents": True}),
        (2, {"lengths": (90, 41)}),
        (70, {"dropout_p": 0.25}),
    ],
    ids=str,
)
def test_attention_for_a_gpu_gives_what_the_cpus_gives(
    gpu: None, queries: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(queries)

    def normal(tokens: int, heads: int) -> Tensor:
        rows = torch.randn(2, tokens, heads * 40 + 1, generator=random).to(dtype)
        # with "odd" no row begins at a multiple of 16 bytes
        part = rows[..., 1:] if options.get("odd") else rows[..., :-1].contiguous()
        return part.unflatten(-1, (heads, 40))

    q, k, v, dout = (normal(n, h) for n, h in ((queries, 4), (90, 2), (90, 2), (queries, 4)))
    documents = lengths = None
    if options.get("documents"):
        documents = torch.arange(90).div(17, rounding_mode="floor").int().repeat(2, 1)
    if "lengths" in options:
        lengths = torch.tensor(options["lengths"], dtype=torch.int32)
    window, dropout_p = options.get("window", 0), options.get("dropout_p", 0.0)
    rest = (0.2, window, documents, lengths, dropout_p, torch.tensor([7]) if dropout_p else None)
    out, lse = torch.ops.pygpt.causal_attention(q, k, v, *rest)
    wanted = [out, *torch.ops.pygpt.causal_attention_backward(dout, q, k, v, out, lse, *rest)]
    there = [on_gpu(x) for x in (q, k, v)]
    rest = tuple(on_gpu(x) if isinstance(x, Tensor) else x for x in rest)
    out, lse = attention._forward_cuda(*there, *rest)
    found = [out, *attention._backward_cuda(on_gpu(dout), *there, on_gpu(out), lse, *rest)]
    for ours, true in zip(found, wanted, strict=True):
        atol = 8 * torch.finfo(dtype).eps * float(true.abs().max())
        torch.testing.assert_close(ours.as_subclass(Tensor), true, rtol=0, atol=atol)


@pytest.mark.parametrize("mixed", [False, True], ids=["numbers", "mixed"])
def test_sampling_for_a_gpu_draws_what_the_cpu_draws(gpu: None, mixed: bool) -> None:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 2500, generator=random) * 3
    uniforms = torch.rand(7, dtype=torch.float64, generator=random)
    for k, p in ((0, 1.0), (0, 0.9), (40, 0.9), (1500, 0.8), (1, 1.0), (1024, 1.0)):
        rows = torch.full((7,), p) if mixed else p
        options = {"top_k": k, "top_p": rows, "temperature": 0.8, "min_p": 0.01}
        wanted = ops.sample(logits, uniforms=uniforms, impl="native", **options)
        numbers = (options["temperature"], k, rows, options["min_p"], 1.0, 0.0, 0.0)
        parameters = sampling._parameters(logits, numbers, "cpu")
        assert len(parameters) == (7 if mixed else 1)
        if mixed:
            parameters = on_gpu(parameters)
        tokens = sampling._cuda_tokens(on_gpu(logits), uniforms, parameters, None, None)
        assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_for_a_gpu_are_those_of_the_cpu(
    gpu: None, monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 24, generator=random).to(dtype) for n in (19, 77))
    bias, targets = torch.randn(77, generator=random).to(dtype), torch.randint(77, (19,))
    targets[3] = -100
    logits = x @ weight.t()
    grad = torch.rand(19, generator=random)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 40 * torch.finfo(dtype).eps}

    def same(found: Any, wanted: Any) -> None:
        for ours, true in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.as_subclass(Tensor), true, **tolerance)

    arguments = (targets, -100, reduction, True)
    same(
        loss._forward_native(on_gpu(logits), *arguments),
        torch.ops.pygpt.cross_entropy(logits, *arguments),
    )
    same(
        [loss._backward_native(grad, on_gpu(logits), targets, -100)],
        [torch.ops.pygpt.cross_entropy_backward(grad, logits, targets, -100)],
    )
    monkeypatch.setattr(linear_loss, "_CUDA_LOGITS_BYTES", 77 * 8 * 4)  # several chunks
    last = (targets, -100, reduction, dtype, [True, True, True])
    same(
        linear_loss._pass(on_gpu(x), on_gpu(weight), on_gpu(bias), *last),
        torch.ops.pygpt.linear_cross_entropy(x, weight, bias, *last),
    )


def test_gpu_check_suggests_only_what_was_right_and_nowhere_slower() -> None:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools/gpu_check.py")
    assert spec is not None and spec.loader is not None
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)
    measured = [
        ("sample", "torch.float32", "B 1", 0.2),
        ("sample", "torch.float32", "B 64", 1.01),
        ("causal_attention", "torch.bfloat16", "T 128", 0.9),
        ("causal_attention", "torch.bfloat16", "T 2048", 1.3),
        ("cross_entropy", "torch.float32", "4096 rows", 0.5),
        ("step", "", "FAILED", math.inf),
    ]
    lines = gpu_check.verdict(measured, {"sampling", "attention"}, (9, 0), "a day, a GPU")
    assert lines == [
        '    ("sample", torch.float32, (9, 0)): "a day, a GPU",',
        "not causal_attention torch.bfloat16: slower at 1 of 2 shapes, 1.30 times torch's time at "
        "T 2048",
        "not cross_entropy torch.float32: its tests failed",
        "the benchmark 'step' failed",
    ]
