"""Where each millisecond of a training step goes, beside what the machine's ceilings would allow.

Parts are times on the calling thread as torch's profiler sees them, own kernels with all that they
call (a feed-forward's second layer with its GELU); "Python and dispatch" is the rest of the wall
clock. The floor of a part is its arithmetic at the best matrix-product rate of this machine, or its
memory traffic at the best copying rate, whichever is longer; traffic counts each operand once, as
if every activation came from memory.

    python benchmarks/profile_step.py --shape "gpt2 124M" --dtype bf16
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_train_step import SHAPES, PlainGPT, stepper, twins
from timing import interleaved, machine, row
from torch.profiler import ProfilerActivity, profile

from pygpt import training
from pygpt.ops.product import gemm

PARTS = {  # the first of these names that an event or one of its callers begins with
    "head and loss": ("pygpt::linear_cross_entropy", "aten::cross_entropy", "aten::_log_softmax"),
    "linear layers": (
        "pygpt::linear",
        "pygpt::gelu_linear",
        "aten::linear",
        "aten::mm",
        "aten::addmm",
    ),
    "attention": ("pygpt::causal_attention", "aten::_scaled_dot_product", "aten::scaled_dot"),
    "GELU": ("pygpt::gelu", "aten::gelu"),
    "sums and LayerNorm": ("_AddNorm", "aten::layer_norm", "aten::native_layer_norm"),
    "embedding": ("aten::embedding",),
    "AdamW": ("Optimizer.step", "aten::_fused_adamw"),
    "gradients set aside": ("Optimizer.zero_grad",),
    "casts, copies, sums": ("aten::",),
}
OTHER = "Python and dispatch"


def part_of(event) -> str | None:
    """The part that an event belongs to: its outermost caller that has a name of its own."""
    found = None
    while event is not None:
        for part, names in PARTS.items():
            if event.name.startswith(names) and (part != "casts, copies, sums" or found is None):
                found = part
                break
        event = event.cpu_parent
    return found


def measured_parts(step, steps: int) -> dict[str, float]:
    """Milliseconds of a step by part; the parts add up to the step's wall clock."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wall = time.perf_counter() - begin
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in profiled.events():
        part = part_of(event)
        if part:
            parts[part] += event.self_cpu_time_total / 1e3 / steps
    parts[OTHER] = max(0.0, 1e3 * wall / steps - sum(parts.values()))
    return parts


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """The best rates seen here: of a matrix product, FLOP/s, and of copying, bytes/s."""
    n = 2048
    a, b, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    products = [lambda: torch.mm(a, b, out=out)]
    if dtype == torch.float32:
        products.append(lambda: gemm(a, b, out))
    big, other = torch.ones(1 << 26), torch.ones(1 << 26)
    copying = interleaved([lambda: other.copy_(big)], 0.5)[0]
    return 2 * n**3 / min(interleaved(products, 0.5)), 2 * big.nbytes / copying


def floors(
    config, batch: int, context: int, size: int, flops: float, traffic: float
) -> dict[str, float]:
    """Milliseconds that each part would take at the ceilings; `size` bytes an activation."""
    c, vocab, layers = config.emb_dim, config.vocab_size, config.n_layers
    tokens, weights = batch * context, layers * 12 * c * c
    parameters = weights + vocab * c
    work = {  # FLOPs and bytes, forward and backward
        "linear layers": (6 * tokens * weights, layers * tokens * size * 3 * 18 * c),
        "head and loss": (6 * tokens * vocab * c, 3 * 4 * vocab * c),
        "attention": (
            3.5 * layers * tokens * 2 * (context + 1) * c,
            layers * tokens * size * 12 * c,
        ),
        "sums and LayerNorm": (0, (2 * layers + 1) * tokens * (16 + 4 * size) * c),
        "embedding": (0, 4 * tokens * size * c),
        "AdamW": (0, 28 * parameters),
        "casts, copies, sums": (0, layers * tokens * size * 6 * c),
    }
    return {part: 1e3 * max(f / flops, b / traffic) for part, (f, b) in work.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="14M")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--plain", action="store_true", help="the plain PyTorch model instead")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    shape, batch, tokens = SHAPES[options.shape]
    bf16 = options.dtype == "bf16"
    ours, plain = twins(*shape)
    model = plain if options.plain else ours
    ids, targets = torch.randint(0, shape[0], (2, batch, tokens)).unbind()
    loss = model if isinstance(model, PlainGPT) else model.loss
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=not options.plain)
    step = stepper(model, loss, optimizer, ids, targets, bf16)
    if not options.plain:
        training.keep_freed_memory()
    for _ in range(3):
        step()
    parts = measured_parts(step, options.steps)
    dtype = torch.bfloat16 if bf16 else torch.float32
    flops, traffic = ceilings(dtype)
    least = floors(ours.config, batch, tokens, dtype.itemsize, flops, traffic)
    print(machine())
    print(
        f"{options.shape}, {options.dtype}, {batch} x {tokens} tokens; ceilings: products "
        f"{flops / 1e9:.0f} GF/s, copying {traffic / 1e9:.0f} GB/s"
    )
    widths = (24, 10, 8, 12)
    row(("part", "ms", "share", "floor ms"), widths)
    whole = sum(parts.values())
    for part, taken in sorted(parts.items(), key=lambda item: -item[1]):
        if not taken:
            continue
        row((part, f"{taken:.2f}", f"{taken / whole:.1%}", f"{least.get(part, 0):.2f}"), widths)
    row(("all", f"{whole:.2f}", "", f"{sum(least.values()):.2f}"), widths)


if __name__ == "__main__":
    main()
