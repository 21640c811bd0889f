"""The CUDA kernels against torch's own choices, and FlashInfer or flash-attn where importable.

Each section first checks that both sides compute the same, then times both in the same run with
device events (median). Rates are of useful operations (causal: half of the square; backward 2.5
times forward). `python benchmarks/bench_cuda.py [section ...]`; the short table comes last and goes
to benchmarks/results/ as well, with what it says of each op against torch's own choice beside it as
JSON. `--device cpu` rehearses all of it on small shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import re
import statistics
import tempfile
import time
import traceback
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
CPU = False  # a rehearsal
table: list[str] = []
verdicts: list[tuple[str, str, str, float]] = []  # op, dtype, shape, its time over torch's


def say(line: str) -> None:
    table.append(line)
    print(line, flush=True)


def compare(op: str, dtype: torch.dtype, shape: str, found: dict[str, float]) -> None:
    """Notes the kernel's time over that of torch's choice; infinity where the kernel failed."""
    ratio = found.get("pygpt", math.inf) / found.get("torch", 1.0)
    verdicts.append((op, str(dtype), shape, ratio))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cpu" if CPU else "cuda", dtype=dtype)


def milliseconds(call: Callable[[], object], seconds: float = 0.15) -> float:
    """Median time of a call on the device, with so many in a row that the host runs ahead."""

    def timed(n: int) -> float:
        if CPU:
            began = time.perf_counter()
            for _ in range(n):
                call()
            return (time.perf_counter() - began) * 1e3 / n
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / n

    if timed(1) < 500:  # else too long to be repeated for warmth
        timed(2)
    once = timed(1)
    n = max(1, min(20, int(10 / max(once, 1e-3))))
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < (3 if once > 500 else 5) or (
        time.perf_counter() - began < seconds and len(times) < 100
    ):
        times.append(timed(n))
    return statistics.median(times)


def in_graph(call: Callable[[], object], repeats: int = 20) -> Callable[[], object]:
    """The call, `repeats` times, as a graph: what it costs without Python and launches."""
    if CPU:
        return lambda: [call() for _ in range(repeats)]
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

    def chosen() -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    def forced(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return chosen()

    sides = {"pygpt": lambda: ops.causal_attention(q, k, v, impl="native"), "torch": chosen}
    sides |= {name: functools.partial(forced, backend) for name, backend in BACKENDS.items()}
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        pass
    else:
        sides["flash_attn"] = lambda: flash_attn_func(q, k, v, causal=True)
    first, working = None, {}
    for name, call in sides.items():
        try:
            out = call().detach()
        except Exception as error:  # this side cannot, or not here
            say(f"   {name}: {str(error).splitlines()[0][:90]}")
            continue
        first = out if first is None else first
        error = float((out.float() - first.float()).abs().max())
        assert error < 0.05, f"{name} differs by {error}"
        working[name] = call
    return working


def attention() -> None:
    say("attention, causal, B x T = 16k, hidden 2048: TFLOP/s forward | backward")
    tokens = 256 if CPU else 16384
    for dtype, lengths in ((torch.bfloat16, (2048, 4096, 16384)), (torch.float16, (4096,))):
        for d in (64, 128):
            for t in (tokens,) if CPU else lengths:
                h, b = 2048 // d, tokens // t
                q, k, v, dout = (random(b, t, h, d, dtype=dtype) for _ in range(4))
                flops = 2 * b * h * t * (t + 1) * d
                found: dict[str, tuple[float, float]] = {}
                sides = attention_sides(*(x.requires_grad_() for x in (q, k, v)))
                for name, call in sides.items():
                    with torch.no_grad():
                        forward = milliseconds(call)
                    found[name] = forward, backward(call, (q, k, v), dout)
                rates = (
                    f"{name} {flops / forth / 1e9:.0f} | {2.5 * flops / back / 1e9:.0f}"
                    for name, (forth, back) in found.items()
                )
                shape = f"{str(dtype)[6:]} D {d:3} T {t:5}"
                say(f"   {shape}   " + "   ".join(rates))
                for i, way in enumerate(("forward", "backward")):
                    times = {name: both[i] for name, both in found.items()}
                    compare("causal_attention", dtype, f"{way} {shape}", times)


def small_attention() -> None:
    say("attention, bf16, 12 heads of 64, in a graph: microseconds forward")
    for b, t in ((1, 128), (1, 512), (1, 1024), (8, 128), (8, 512), (8, 1024)):
        q, k, v = (random(b, t, 12, 64) for _ in "qkv")
        sides = attention_sides(q, k, v)
        found = {name: milliseconds(in_graph(call)) * 50 for name, call in sides.items()}
        say(f"   B {b} T {t:4}   " + "   ".join(f"{n} {x:.1f}" for n, x in found.items()))
        compare("causal_attention", q.dtype, f"small B {b} T {t}", found)


def float_attention() -> None:
    b, t = (1, 256) if CPU else (8, 1024)
    say(f"attention, float32, 12 heads of 64, B {b} T {t}: milliseconds forward | backward")
    q, k, v, dout = (random(b, t, 12, 64, dtype=torch.float32) for _ in range(4))
    found = {}
    for name, call in attention_sides(*(x.requires_grad_() for x in (q, k, v))).items():
        with torch.no_grad():
            forward = milliseconds(call)
        found[name] = forward, backward(call, (q, k, v), dout)
    say("   " + "   ".join(f"{n} {x:.2f} | {y:.2f}" for n, (x, y) in found.items()))
    for i, way in enumerate(("forward", "backward")):
        times = {name: both[i] for name, both in found.items()}
        compare("causal_attention", q.dtype, way, times)


def decode(bandwidth: float) -> None:
    say("decode, bf16, one query, in a graph: share of the measured bandwidth")
    for h, h_kv, d in ((12, 12, 64), (32, 8, 128)):
        for b in (1, 2) if CPU else (1, 8, 64):
            for s in (512,) if CPU else (1024, 4096, 16384):
                bytes_read = 2 * b * s * h_kv * d * 2
                if bytes_read > 5e9:
                    continue
                copies = 2 if CPU else max(1, min(8, int(4e8 / bytes_read)))  # beyond the L2 cache
                sets = [
                    [random(b, n, heads, d) for n, heads in ((1, h), (s, h_kv), (s, h_kv))]
                    for _ in range(copies)
                ]

                def native(sets: list[list[Tensor]] = sets) -> list[Tensor]:
                    return [ops.causal_attention(*x, impl="native") for x in sets]

                def torchs(sets: list[list[Tensor]] = sets) -> list[Tensor]:
                    heads_first = ([x.transpose(1, 2) for x in some] for some in sets)
                    return [
                        F.scaled_dot_product_attention(*x, enable_gqa=True).transpose(1, 2)
                        for x in heads_first
                    ]

                torch.testing.assert_close(native()[0], torchs()[0], rtol=0, atol=0.03)
                found = {
                    name: milliseconds(in_graph(call, 4)) / 4 / copies
                    for name, call in (("pygpt", native), ("torch", torchs))
                }
                shape = f"{h}/{h_kv} x {d:3} B {b:2} S {s:5}"
                shares = (
                    f"{name} {each * 1e3:.1f} us {bytes_read / each / 1e6 / bandwidth:.0%}"
                    for name, each in found.items()
                )
                say(f"   {shape}   " + "   ".join(shares))
                compare("causal_attention", torch.bfloat16, f"decode {shape}", found)


def sampling() -> None:
    say("sampling, vocabulary 50,257, top-k 50 + top-p 0.9, in a graph: microseconds")
    try:
        import flashinfer
    except ImportError:
        flashinfer = None
    device = "cpu" if CPU else "cuda"
    for b, dtype in (
        (1, torch.float32),
        (8, torch.float32),
        (64, torch.float32),
        (8, torch.bfloat16),
    ):
        logits = (random(b, 50257, dtype=torch.float32) * 3).to(dtype)
        parameters = torch.tensor([[1.0, 50, 0.9, 0, 1, 0, 0]], dtype=torch.float64, device=device)
        uniforms = torch.rand(b, dtype=torch.float64, device=device)

        def usual(logits: Tensor = logits) -> Tensor:
            top, index = torch.sort(logits, dim=1, descending=True)
            p = top[:, :50].float().softmax(1)
            p = p * (p.cumsum(1) - p < 0.9)
            return index.gather(1, (p / torch.empty_like(p).exponential_()).argmax(1, keepdim=True))

        arguments = (logits, uniforms, parameters, None, None)
        sides = {
            "pygpt": lambda a=arguments: torch.ops.pygpt.sample(*a),
            "torch": lambda a=arguments: sample_torch(*a),  # pygpt's own, from torch's ops
            "sort, softmax, draw": usual,
        }
        assert torch.equal(sides["pygpt"](), sides["torch"]())
        if flashinfer is not None:
            draw = flashinfer.sampling.top_k_top_p_sampling_from_logits
            sides["flashinfer"] = functools.partial(draw, logits, 50, 0.9)
        found = {name: milliseconds(in_graph(call, 5)) * 200 for name, call in sides.items()}
        shape = f"{str(dtype)[6:]} B {b:2}"
        compare("sample", dtype, shape, found)
        for values in ((1.0, 0, 0.9, 0, 1, 0, 0), (1.0, 0, 1.0, 0, 1, 0, 0)):
            plain = torch.tensor([values], dtype=torch.float64, device=device)
            only = (logits, uniforms, plain, None, None)
            call = in_graph(lambda a=only: torch.ops.pygpt.sample(*a), 5)
            found[f"pygpt top-p {values[2]} alone"] = milliseconds(call) * 200
        say(f"   {shape}   " + "   ".join(f"{name} {took:.0f}" for name, took in found.items()))


def losses() -> None:
    """The loss of a language model's head, fused with it and alone."""
    rows, width, vocab = (64, 48, 5000) if CPU else (16384, 768, 50257)
    say(f"loss, {rows} x {width} -> {vocab}, forward + backward: ms, MB beyond inputs and results")
    targets = torch.randint(vocab, (rows,), device="cpu" if CPU else "cuda")
    for dtype in (torch.bfloat16, torch.float32):
        x = random(rows, width, dtype=dtype).requires_grad_()
        weight = (random(vocab, width, dtype=dtype) / 28).requires_grad_()
        some = rows // 8
        logits = random(some, vocab, dtype=dtype).requires_grad_()
        for op, inputs, labels in (
            ("linear_cross_entropy", (x, weight), targets),
            ("cross_entropy", (logits,), targets[:some]),
        ):
            found, sums = {}, []
            for name, impl in (("pygpt", "native"), ("torch", "torch")):

                def call(
                    op: str = op,
                    inputs: tuple[Tensor, ...] = inputs,
                    labels: Tensor = labels,
                    impl: str = impl,
                ) -> Tensor:
                    loss = getattr(ops, op)(*inputs, labels, impl=impl)
                    torch.autograd.grad(loss, inputs)
                    return loss.detach()

                sums.append(float(call()))
                if not CPU:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                took, beyond = milliseconds(call), 0.0
                if not CPU:
                    own = sum(one.nbytes for one in inputs)
                    beyond = (torch.cuda.max_memory_allocated() - before - own) / 1e6
                found[name] = took, beyond
            assert abs(sums[0] - sums[1]) < 0.02, sums
            both = (f"{name} {took:.2f} ms {mb:.0f} MB" for name, (took, mb) in found.items())
            say(f"   {op} {str(dtype)[6:]}   " + "   ".join(both))
            compare(op, dtype, f"{len(labels)} rows", {n: took for n, (took, _) in found.items()})


def training_step(matmul: float) -> None:
    device, layers = ("cpu", 1) if CPU else ("cuda", 12)
    parts, batch, context = (2, 2, 32) if CPU else (4, 16, 1024)
    say(
        f"GPT-2 124M step, {parts} x {batch} x {context} tokens, bf16 autocast, compiled: "
        "tokens/s, share of the measured matmul"
    )
    ours, plain = (model.to(device) for model in twins(50257, context, 768, 12, layers))
    ids = torch.randint(50257, (parts, batch, context + 1), device=device)
    found = []
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
                with torch.autocast(device, torch.bfloat16):
                    loss = loss_of(part[:, :-1], part[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        with ops.backend(impl):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                found.append(float(model.loss(ids[0, :2, :-1], ids[0, :2, 1:])))
            rate = parts * batch * context / milliseconds(step, 3.0) * 1e3
        share = 3 * rate * ours.flops_per_token(context) / matmul
        say(f"   {name:18} {rate:,.0f} tokens/s   {share:.0%}")
        torch._dynamo.reset()
    assert abs(found[0] - found[1]) < 0.02, found  # the third model has learned in between


def generation() -> None:
    try:
        import transformers
    except ImportError:
        say("generation: transformers is not installed")
        return
    device, layers, tokens = ("cpu", 1, 8) if CPU else ("cuda", 12, 128)
    say(f"GPT-2 124M, {tokens} greedy tokens after 64, bf16: tokens/s")
    transformers.utils.logging.disable_progress_bar()
    model = GPT(GPTConfig.preset("gpt2", init_std=0.05, n_layers=layers)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    model = model.to(device)

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

    ids = torch.randint(50257, (8, 64), device=device)
    assert native(ids, 8) == usual(ids, 8)  # in float32
    model, theirs = model.bfloat16(), theirs.bfloat16()
    for b in (1, 8):
        found = []
        for name, call in (("pygpt", native), ("transformers", usual)):
            took = milliseconds(functools.partial(call, ids[:b], tokens), 1.0)
            found.append(f"{name} {b * tokens / took * 1e3:,.0f}")
        say(f"   B {b}   " + "   ".join(found))


def ceilings() -> tuple[float, float]:
    """GB/s of a copy, read plus written, and FLOP/s of a bf16 matmul of random numbers."""
    size, n = (2**20, 128) if CPU else (2**30, 8192)
    x = random(size, dtype=torch.float32).view(torch.uint8)[:size]
    y = torch.empty_like(x)
    a = random(n, n)
    bandwidth = 2 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6
    return bandwidth, 2 * n**3 / milliseconds(lambda: a @ a) * 1e3


def main() -> None:
    global CPU
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", help="attention small decode sampling loss float step generate"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="start no section after this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder for the table")
    arguments = parser.parse_args()
    CPU = arguments.device == "cpu"
    began = time.perf_counter()
    name = "a CPU's rehearsal" if CPU else torch.cuda.get_device_name()
    say(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {datetime.date.today()}")
    bandwidth, matmul = ceilings()
    say(f"measured: copy {bandwidth:.0f} GB/s, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
    sections: dict[str, Callable[[], None]] = {
        "attention": attention,
        "small": small_attention,
        "decode": lambda: decode(bandwidth),
        "sampling": sampling,
        "loss": losses,
        "float": float_attention,
        "step": lambda: training_step(matmul),
        "generate": generation,
    }
    chosen = arguments.sections or list(sections)
    file = "-".join(["cuda", *re.findall("[a-z0-9]+", name.lower()), *arguments.sections])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for section in chosen:
        if time.perf_counter() - began > arguments.seconds:
            say(f"{section}: no time left")
            continue
        try:
            sections[section]()
        except Exception as error:  # the other sections still say something
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0]
            say(f"{section}: FAILED, {type(error).__name__}: {said[:80]}")
            verdicts.append((section, "", "FAILED", math.inf))
        (arguments.out / f"{file}.txt").write_text("\n".join(table) + "\n", encoding="utf-8")
        (arguments.out / f"{file}.json").write_text(json.dumps(verdicts), encoding="utf-8")
        if not CPU:
            torch.cuda.empty_cache()
    print("\n" + "=" * 100 + "\n" + "\n".join(table))


if __name__ == "__main__":
    main()
