"""A training step of pygpt.GPT against the plain PyTorch GPT that everybody writes.

Both start from the same weights; loss and gradients are compared first. Plain: nn.Linear, scaled
dot product attention, F.cross_entropy on all logits, AdamW as it comes. --compile adds
torch.compile of the plain model; --shape picks one.
"""

from __future__ import annotations

import argparse

import torch
from timing import interleaved, machine, row
from torch import nn
from torch.nn import functional as F

import pygpt

SHAPES = {  # (config, batch, tokens)
    "0.8M characters": ((65, 64, 128, 4, 4), 12, 64),
    "1M demo": ((1024, 128, 128, 4, 5), 16, 128),
    "14M": ((8192, 256, 384, 6, 6), 16, 256),
    "gpt2 124M": ((50257, 1024, 768, 12, 12), 4, 256),
}


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, vocab, context, width, heads, layers):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)

    def loss(self, ids, targets):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.tok_emb.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each side of each line")
    options = parser.parse_args()
    print(machine())
    widths = (28, 12, 12, 8, 12, 8)
    head = ["tokens a second", "pygpt", "plain", "ratio"]
    row([*head, "compiled", "ratio"] if options.compile else [*head, "", ""], widths)
    for name in options.shape or SHAPES:
        config, batch, tokens = SHAPES[name]
        for bf16 in (False, True):
            ours, plain = twins(*config)
            ids = torch.randint(0, config[0], (batch, tokens))
            targets = torch.randint(0, config[0], (batch, tokens))
            check_equal(ours, plain, ids, targets, bf16)
            sides = [
                stepper(
                    ours,
                    ours.loss,
                    torch.optim.AdamW(ours.parameters(), 1e-4, fused=True),
                    ids,
                    targets,
                    bf16,
                ),
                stepper(
                    plain, plain, torch.optim.AdamW(plain.parameters(), 1e-4), ids, targets, bf16
                ),
            ]
            if options.compile:
                compiled = torch.compile(plain)
                optimizer = torch.optim.AdamW(plain.parameters(), 1e-4)
                sides.append(stepper(plain, compiled, optimizer, ids, targets, bf16))
            times = interleaved(sides, options.seconds)
            rates = [batch * tokens / time for time in times]
            cells = [f"{name}, {'bf16' if bf16 else 'fp32'}", *(f"{x:,.0f}" for x in rates[:2])]
            cells.append(f"{rates[0] / rates[1]:.2f}")
            cells += (
                [f"{rates[2]:,.0f}", f"{rates[0] / rates[2]:.2f}"] if options.compile else ["", ""]
            )
            row(cells, widths)


if __name__ == "__main__":
    main()
