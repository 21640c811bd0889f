"""float32 linear layers, forward and both gradients: pygpt's product against torch's."""

from __future__ import annotations

import argparse

import torch
from timing import interleaved, machine, row

from pygpt.ops.product import gemm

SHAPES = [  # rows, width in, width out
    (1024, 768, 2304),
    (1024, 768, 3072),
    (1024, 3072, 768),
    (256, 768, 50257),
    (4096, 384, 1536),
    (2048, 128, 512),
    (768, 128, 384),
    (64, 768, 768),
]


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine())
    torch.manual_seed(0)
    widths = (30, 12, 12, 8)
    row(("GF/s, rows x in -> out", "pygpt", "torch", "ratio"), widths)
    for rows, depth, cols in SHAPES:
        x, weight, grad = (
            torch.randn(rows, depth),
            torch.randn(cols, depth),
            torch.randn(rows, cols),
        )
        for name, a, b in (
            ("forward", x, weight.t()),
            ("dx", grad, weight),
            ("dw", grad.t(), x),
        ):
            ours, theirs = (torch.empty(a.shape[0], b.shape[1]) for _ in range(2))
            exact = a.double() @ b.double()
            products = [
                lambda a=a, b=b, out=ours: gemm(a, b, out),
                lambda a=a, b=b, out=theirs: torch.mm(a, b, out=out),
            ]
            for product in products:
                product()
            errors = [float((out - exact).square().mean().sqrt()) for out in (ours, theirs)]
            assert errors[0] <= 1.02 * errors[1], f"RMS errors {errors}"
            rates = [2e-9 * rows * depth * cols / t for t in interleaved(products, 0.3)]
            label = f"{rows} x {depth} -> {cols} {name}"
            row((label, *(f"{r:.0f}" for r in rates), f"{rates[0] / rates[1]:.2f}"), widths)


if __name__ == "__main__":
    main()
