"""The CUDA kernels against torch's own choices, and FlashInfer or flash-attn where importable.

Each section first checks that both sides compute the same, then times both in the same run with
device events (median). Rates are of useful operations (causal: half of the square; backward 2.5
times forward). `python benchmarks/bench_cuda.py [section ...]`; the short table comes last and goes
to benchmarks/results/ as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_train_step import twins
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pygpt import GPT, GPTConfig, generate, ops
from pygpt.ops.sampling import sample_torch

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
table: list[str] = []


def say(line: str) -> None:
    table.append(line)
    print(line, flush=True)


def milliseconds(call: Callable[[], object], seconds: float = 0.15) -> float:
    """Median time of a call on the device."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < seconds and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_graph(call: Callable[[], object], repeats: int = 20) -> Callable[[], object]:
    """The call, `repeats` times, as a graph: what it costs without Python and launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def backward(call: Callable[[], Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> float:
    """Milliseconds of the backward alone."""
    out = call()
    return milliseconds(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))


def attention_sides(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every implementation of causal attention that runs here, on (B, T, H, D)."""

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
                ).transpose(1, 2)

        return call

    sides = {"pygpt": lambda: ops.causal_attention(q, k, v, impl="native")}
    sides |= {name: sdpa(backend) for name, backend in BACKENDS.items()}
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        pass
    else:
        sides["flash_attn"] = lambda: flash_attn_func(q, k, v, causal=True)
    working = {}
    for name, call in sides.items():
        try:
            out = call()
        except RuntimeError as error:
            print(f"   {name}: {str(error).splitlines()[0][:90]}")
            continue
        if working:
            error = float((out.float() - working["pygpt"]().float()).abs().max())
            assert error < 0.05, f"{name} differs by {error}"
        working[name] = call
    return working


def attention() -> None:
    say("attention, bf16, causal, B x T = 16k, hidden 2048: TFLOP/s forward | backward")
    for d in (64, 128):
        for t in (2048, 4096, 16384):
            h, b = 2048 // d, 16384 // t
            q, k, v, dout = (
                torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)
            )
            flops = 2 * b * h * t * (t + 1) * d
            rates = []
            sides = attention_sides(*(x.requires_grad_() for x in (q, k, v)))
            for name, call in sides.items():
                with torch.no_grad():
                    forward = milliseconds(call)
                back = backward(call, (q, k, v), dout)
                rates.append(f"{name} {flops / forward / 1e9:.0f} | {2.5 * flops / back / 1e9:.0f}")
            say(f"   D {d:3} T {t:5}   " + "   ".join(rates))


def small_attention() -> None:
    say("attention, bf16, 12 heads of 64, in a graph: microseconds forward")
    for b, t in ((1, 128), (1, 512), (1, 1024), (8, 128), (8, 512), (8, 1024)):
        q, k, v = (torch.randn(b, t, 12, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        found = [
            f"{name} {milliseconds(in_graph(call)) * 50:.1f}"
            for name, call in attention_sides(q, k, v).items()
        ]
        say(f"   B {b} T {t:4}   " + "   ".join(found))


def float_attention() -> None:
    say("attention, float32, 12 heads of 64, B 8 T 1024: milliseconds forward | backward")
    q, k, v, dout = (torch.randn(8, 1024, 12, 64, device="cuda") for _ in range(4))
    found = []
    for name, call in attention_sides(*(x.requires_grad_() for x in (q, k, v))).items():
        back = backward(call, (q, k, v), dout)
        found.append(f"{name} {milliseconds(call):.2f} | {back:.2f}")
    say("   " + "   ".join(found))


def decode(bandwidth: float) -> None:
    say("decode, bf16, one query, in a graph: share of the measured bandwidth")
    for h, h_kv, d in ((12, 12, 64), (32, 8, 128)):
        for b in (1, 8, 64):
            for s in (1024, 4096, 16384):
                bytes_read = 2 * b * s * h_kv * d * 2
                if bytes_read > 5e9:
                    continue
                copies = max(1, min(8, int(4e8 / bytes_read)))  # more than the L2 cache holds
                sets = [
                    [
                        torch.randn(b, n, heads, d, device="cuda", dtype=torch.bfloat16)
                        for n, heads in ((1, h), (s, h_kv), (s, h_kv))
                    ]
                    for _ in range(copies)
                ]

                def native(sets: list[list[Tensor]] = sets) -> None:
                    for q, k, v in sets:
                        ops.causal_attention(q, k, v, impl="native")

                def torchs(sets: list[list[Tensor]] = sets) -> None:
                    for q, k, v in sets:
                        F.scaled_dot_product_attention(
                            *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True
                        )

                found = []
                for name, call in (("pygpt", native), ("torch", torchs)):
                    each = milliseconds(in_graph(call, 4)) / 4 / copies
                    rate = bytes_read / each / 1e6
                    found.append(f"{name} {each * 1e3:.1f} us {rate / bandwidth:.0%}")
                say(f"   {h}/{h_kv} x {d:3} B {b:2} S {s:5}   " + "   ".join(found))


def sampling() -> None:
    say("sampling, vocabulary 50,257, top-k 50 + top-p 0.9, in a graph: microseconds")
    try:
        import flashinfer
    except ImportError:
        flashinfer = None
    for b in (1, 8, 64):
        logits = torch.randn(b, 50257, device="cuda") * 3
        parameters = torch.tensor([[1.0, 50, 0.9, 0, 1, 0, 0]], dtype=torch.float64, device="cuda")
        uniforms = torch.rand(b, dtype=torch.float64, device="cuda")

        def usual(logits: Tensor = logits) -> Tensor:
            top, index = torch.sort(logits, dim=1, descending=True)
            p = top[:, :50].softmax(1)
            p = p * (p.cumsum(1) - p < 0.9)
            return index.gather(1, (p / torch.empty_like(p).exponential_()).argmax(1, keepdim=True))

        arguments = (logits, uniforms, parameters, None, None)
        sides = {
            "pygpt": lambda a=arguments: torch.ops.pygpt.sample(*a),
            "pygpt from torch's ops": lambda a=arguments: sample_torch(*a),
            "sort, softmax, draw": usual,
        }
        assert torch.equal(sides["pygpt"](), sides["pygpt from torch's ops"]())
        if flashinfer is not None:
            draw = flashinfer.sampling.top_k_top_p_sampling_from_logits
            sides["flashinfer"] = functools.partial(draw, logits, 50, 0.9)
        found = [
            f"{name} {milliseconds(in_graph(call, 5)) * 200:.0f}" for name, call in sides.items()
        ]
        for p in ((1.0, 0, 0.9, 0, 1, 0, 0), (1.0, 0, 1.0, 0, 1, 0, 0)):
            plain = torch.tensor([p], dtype=torch.float64, device="cuda")
            only = (logits, uniforms, plain, None, None)
            call = in_graph(lambda a=only: torch.ops.pygpt.sample(*a), 5)
            found.append(f"pygpt top-p {p[2]} alone {milliseconds(call) * 200:.0f}")
        say(f"   B {b:2}   " + "   ".join(found))


def linear_cross_entropy() -> None:
    say("linear + cross-entropy, bf16, 16k x 768 -> 50,257, forward + backward: ms, MB beyond")
    x = torch.randn(16384, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50257, 768, device="cuda", dtype=torch.bfloat16) / 28
    weight.requires_grad_()
    targets = torch.randint(50257, (16384,), device="cuda")
    found = []
    losses = []
    for impl in ("native", "torch"):

        def call(impl: str = impl) -> Tensor:
            loss = ops.linear_cross_entropy(x, weight, targets, impl=impl)
            torch.autograd.grad(loss, (x, weight))
            return loss.detach()

        losses.append(float(call()))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        took = milliseconds(call)
        own = x.nbytes + weight.nbytes
        beyond = torch.cuda.max_memory_allocated() - before - own
        found.append(f"{impl} {took:.1f} ms {beyond / 1e6:.0f} MB")
    assert abs(losses[0] - losses[1]) < 0.02, losses
    say("   " + "   ".join(found))


def training_step(matmul: float) -> None:
    say("GPT-2 124M step, 64k tokens (4 x 16 x 1024), bf16 autocast, compiled: tokens/s, of matmul")
    ours, plain = (model.cuda() for model in twins(50257, 1024, 768, 12, 12))
    ids = torch.randint(50257, (4, 16, 1025), device="cuda")
    losses = []
    for name, model, impl in (
        ("plain PyTorch", plain, "torch"),
        ("pygpt, torch's ops", ours, "torch"),
        ("pygpt, native ops", ours, "native"),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        loss_of = torch.compile(model.loss)

        def step(
            loss_of: Callable[..., Tensor] = loss_of,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> Tensor:
            for part in ids:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = loss_of(part[:, :-1], part[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        with ops.backend(impl):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                losses.append(float(model.loss(ids[0, :2, :-1], ids[0, :2, 1:])))
            rate = ids.shape[0] * 16 * 1024 / milliseconds(step, 3.0) * 1e3
        share = 3 * rate * ours.flops_per_token(1024) / matmul
        say(f"   {name:18} {rate:,.0f} tokens/s   {share:.0%}")
        torch._dynamo.reset()
    assert abs(losses[0] - losses[1]) < 0.02, losses  # the third model has learned in between


def generation() -> None:
    try:
        import transformers
    except ImportError:
        say("generation: transformers is not installed")
        return
    say("GPT-2 124M, 128 greedy tokens after 64, bf16: tokens/s")
    transformers.utils.logging.disable_progress_bar()
    model = GPT(GPTConfig.preset("gpt2", init_std=0.05)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).cuda().eval()
    model = model.cuda()

    def usual(ids: Tensor, n: int) -> list[list[int]]:
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        ).tolist()

    def native(ids: Tensor, n: int) -> list[list[int]]:
        with ops.backend("native"):
            return generate(model, ids, n, temperature=0.0)

    ids = torch.randint(50257, (8, 64), device="cuda")
    assert native(ids, 16) == usual(ids, 16)  # in float32
    model, theirs = model.bfloat16(), theirs.bfloat16()
    for b in (1, 8):
        found = []
        for name, call in (("pygpt", native), ("transformers", usual)):
            took = milliseconds(functools.partial(call, ids[:b], 128), 1.0)
            found.append(f"{name} {b * 128 / took * 1e3:,.0f}")
        say(f"   B {b}   " + "   ".join(found))


def ceilings() -> tuple[float, float]:
    """GB/s of a copy, read plus written, and FLOP/s of a bf16 matmul of random numbers."""
    x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    bandwidth = 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: a @ a) * 1e3


def save(device: str) -> None:
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    label = "-".join(device.lower().split())
    (results / f"cuda-{label}.txt").write_text("\n".join(table) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", help="attention small float decode sampling loss step generate"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="start no section after this")
    arguments = parser.parse_args()
    began = time.perf_counter()
    name = torch.cuda.get_device_name()
    say(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    bandwidth, matmul = ceilings()
    say(f"measured: copy {bandwidth:.0f} GB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    sections: dict[str, Callable[[], None]] = {
        "attention": attention,
        "small": small_attention,
        "decode": lambda: decode(bandwidth),
        "sampling": sampling,
        "loss": linear_cross_entropy,
        "float": float_attention,
        "step": lambda: training_step(matmul),
        "generate": generation,
    }
    for section, run in sections.items():
        if arguments.sections and section not in arguments.sections:
            continue
        if time.perf_counter() - began > arguments.seconds:
            say(f"{section}: no time left")
            continue
        try:
            run()
        except Exception as error:  # the other sections still say something
            say(f"{section}: FAILED, {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        torch.cuda.empty_cache()
        save(name)
    print("\n" + "=" * 100 + "\n" + "\n".join(table))


if __name__ == "__main__":
    main()
