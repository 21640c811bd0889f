"""Linear + cross-entropy, forward and backward: pygpt against F.linear and F.cross_entropy."""

from __future__ import annotations

import torch
from timing import interleaved, machine, row
from torch.nn import functional as F

from pygpt import ops

SHAPES = [(1024, 50257, 768), (4096, 8192, 384), (2048, 1024, 128), (768, 65, 128)]


def main():
    print(machine())
    torch.manual_seed(0)
    widths = (44, 10, 10, 8)
    row(("tokens x width -> vocabulary", "pygpt ms", "torch ms", "ratio"), widths)
    for rows, vocab, width in SHAPES:
        for name, dtype, autocast in (
            ("float32", torch.float32, False),
            ("bfloat16 autocast", torch.float32, True),
            ("bfloat16", torch.bfloat16, False),
        ):
            x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
            weight = (torch.randn(vocab, width) * 0.02).to(dtype).requires_grad_()
            targets = torch.randint(0, vocab, (rows,))

            def step(loss, x=x, weight=weight, targets=targets, autocast=autocast):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    value = loss(x, weight, targets)
                return value.detach(), *torch.autograd.grad(value, (x, weight))

            def plain(x, weight, targets):
                return F.cross_entropy(F.linear(x, weight), targets)

            tolerance = 1e-4 if name == "float32" else 2e-2
            for a, b in zip(step(ops.linear_cross_entropy), step(plain), strict=True):
                difference = (a.double() - b.double()).abs().max() / b.double().abs().max()
                assert difference < tolerance, f"{name}: difference {difference:.2g}"
            ours, theirs = interleaved(
                [lambda step=step: step(ops.linear_cross_entropy), lambda step=step: step(plain)]
            )
            row(
                (
                    f"{rows} x {width} -> {vocab}, {name}",
                    f"{ours * 1e3:.2f}",
                    f"{theirs * 1e3:.2f}",
                    f"{theirs / ours:.2f}",
                ),
                widths,
            )


if __name__ == "__main__":
    main()
