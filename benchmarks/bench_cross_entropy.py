"""Linear + cross-entropy, forward and backward: pygpt against F.linear and F.cross_entropy.

Losses and gradients are compared first. Then each side is a process of its own, as users run it:
ours keeps its memory as in training, torch has malloc as it comes.
"""

from __future__ import annotations

import argparse

import torch
from timing import in_processes, machine, row, serve
from torch import Tensor
from torch.nn import functional as F

from pygpt import ops, training

SHAPES = [(1024, 50257, 768), (4096, 8192, 384), (2048, 1024, 128), (768, 65, 128)]
KINDS = {  # (dtype of x and weight, autocast)
    "float32": (torch.float32, False),
    "bfloat16 autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, float logits": (torch.bfloat16, False),
}


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets)


def plain_float(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def stepper(side, shape, kind):
    """A call that gives the loss and both gradients."""
    torch.manual_seed(0)
    (rows, vocab, width), (dtype, autocast) = shape, KINDS[kind]
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, width) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    theirs = plain_float if kind.endswith("float logits") else plain
    loss = ops.linear_cross_entropy if side == "pygpt" else theirs

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(x, weight, targets)
        return value.detach(), *torch.autograd.grad(value, (x, weight))

    return step


def worker(side, shape, kind, pipe):
    if side == "pygpt":
        training.keep_freed_memory()
    serve(pipe, stepper(side, shape, kind))


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine())
    widths = (48, 10, 10, 8)
    row(("tokens x width -> vocabulary", "pygpt ms", "torch ms", "ratio"), widths)
    for shape in SHAPES:
        for kind in KINDS:
            tolerance = 1e-4 if kind == "float32" else 2e-2
            for a, b in zip(
                *(stepper(side, shape, kind)() for side in ("pygpt", "torch")), strict=True
            ):
                difference = (a.double() - b.double()).abs().max() / b.double().abs().max()
                assert difference < tolerance, f"{kind}: difference {difference:.2g}"
            (ours, theirs), _ = in_processes(worker, ("pygpt", "torch"), (shape, kind), 3.0)
            rows, vocab, width = shape
            name = f"{rows} x {width} -> {vocab}, {kind}"
            ratio = f"{theirs / ours:.2f}"
            row((name, f"{ours * 1e3:.2f}", f"{theirs * 1e3:.2f}", ratio), widths)


if __name__ == "__main__":
    main()
