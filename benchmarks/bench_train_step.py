"""A training step of pygpt.GPT against the plain PyTorch GPT that everybody writes.

Loss and gradients from the same weights are compared first. Then each side is a process of its own,
and they take steps in turns. Plain: nn.Linear, scaled dot product attention, F.cross_entropy on all
logits, AdamW as it comes. --compile adds torch.compile of it; --shape picks one. The last column is
the peak resident memory beyond weights, gradients, optimiser state and what Python and torch take.
"""

from __future__ import annotations

import argparse

import torch
from memory import peak, resident
from timing import in_processes, interleaved, machine, row, serve
from torch import nn
from torch.nn import functional as F

import pygpt
from pygpt import ops, training

LONG = "gpt2 124M, long"  # minutes: only when asked for
SHAPES = {  # (config, batch, tokens)
    "0.8M characters": ((65, 64, 128, 4, 4), 12, 64),
    "1M demo": ((1024, 128, 128, 4, 5), 16, 128),
    "14M": ((8192, 256, 384, 6, 6), 16, 256),
    "gpt2 124M": ((50257, 1024, 768, 12, 12), 4, 256),
    LONG: ((50257, 1024, 768, 12, 12), 2, 1024),
}


class PlainBlock(nn.Module):
    def __init__(self, width, heads, bias, gelu):
        super().__init__()
        self.heads, self.gelu = heads, gelu
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=self.gelu))


class PlainGPT(nn.Module):
    """GPT-2 in the fewest lines, with a tied head; `gelu` is F.gelu's approximation."""

    def __init__(self, vocab, context, width, heads, layers, bias=True, gelu="tanh"):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, bias, gelu) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width, bias=bias)

    def loss(self, ids, targets, reduction="mean"):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.tok_emb.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

    forward = loss


def twins(vocab, context, width, heads, layers):
    torch.manual_seed(0)
    config = pygpt.GPTConfig(vocab, context, width, heads, layers, 0.0, True, True)
    ours, plain = pygpt.GPT(config), PlainGPT(vocab, context, width, heads, layers)
    renamed = {
        name.replace(".att.", ".").replace(".ff.", "."): value
        for name, value in ours.state_dict().items()
    }
    plain.load_state_dict(renamed)
    return ours, plain


def check_equal(ours, plain, ids, targets, bf16):
    tolerance = 3e-2 if bf16 else 1e-4
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        a, b = ours.loss(ids, targets), plain.loss(ids, targets)
    assert abs(a - b) < tolerance * b, f"losses {a} and {b}"
    a.backward()
    b.backward()
    theirs = dict(plain.named_parameters())
    for name, p in ours.named_parameters():
        other = theirs[name.replace(".att.", ".").replace(".ff.", ".")].grad
        difference = (p.grad - other).norm() / other.norm()
        assert difference < tolerance, f"gradient of {name} differs by {difference:.2g}"


def stepper(model, loss, optimizer, ids, targets, bf16):
    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(ids, targets)
        value.backward()
        optimizer.step()

    return step


def worker(side, shape, bf16, pipe):
    """One side in a process of its own, as a user runs it: a step for every message."""
    config, batch, tokens = SHAPES[shape]
    torch.manual_seed(0)
    before = resident()
    if side == "pygpt":
        training.keep_freed_memory()
        model = pygpt.GPT(pygpt.GPTConfig(*config, 0.0, True, True))
        optimizer, loss = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), model.loss
    else:
        model = PlainGPT(*config)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        loss = torch.compile(model) if side == "compiled" else model
    ids, targets = torch.randint(0, config[0], (2, batch, tokens)).unbind()
    state = 16 * sum(p.numel() for p in model.parameters())  # weight, gradient, two moments
    step = stepper(model, loss, optimizer, ids, targets, bf16)
    serve(pipe, step, lambda: peak() - before - state)


def compare_with_the_twins(shape="0.8M characters"):
    """Native ops against their slow twins in pygpt/reference.py, at a small size."""
    config, batch, tokens = SHAPES[shape]
    model = twins(*config)[0]
    ids, targets = torch.randint(0, config[0], (2, batch, tokens)).unbind()
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=True)
    step = stepper(model, model.loss, optimizer, ids, targets, False)

    def slow(function):
        with ops.backend("reference"):
            return function()

    ours, theirs = model.loss(ids, targets), slow(lambda: model.loss(ids, targets))
    assert abs(ours - theirs) < 1e-4 * theirs, f"losses {ours} and {theirs}"
    native, python = interleaved([step, lambda: slow(step)], 2.0)
    print(f"{shape}: with the reference ops in Python {python / native:.1f} x as long")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each side of each line")
    options = parser.parse_args()
    print(machine())
    sides = ["pygpt", "plain", *(["compiled"] if options.compile else [])]
    widths = (28, *([12] * len(sides)), *([8] * (len(sides) - 1)), 16)
    ratios = [f"/ {side}" for side in sides[1:]]
    row(("tokens a second", *sides, *ratios, "MB beyond state"), widths)
    for name in options.shape or [shape for shape in SHAPES if shape != LONG]:
        config, batch, tokens = SHAPES[name]
        ids, targets = torch.randint(0, config[0], (2, batch, tokens)).unbind()
        for dtype in options.dtype or ("fp32", "bf16"):
            check_equal(*twins(*config), ids, targets, dtype == "bf16")
            arguments = (name, dtype == "bf16")
            times, beyond = in_processes(worker, sides, arguments, options.seconds)
            rates = [f"{batch * tokens / time:,.0f}" for time in times]
            against = [f"{time / times[0]:.2f}" for time in times[1:]]
            megabytes = " / ".join(f"{x / 1e6:.0f}" for x in beyond)
            row((f"{name}, {dtype}", *rates, *against, megabytes), widths)
    compare_with_the_twins()


if __name__ == "__main__":
    main()
