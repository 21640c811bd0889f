"""Generation with a KV cache: pygpt against the same model with torch's own operations.

First the linear layers of a step, (rows, width) by the transposed matrix, with the matrix in the
caches and ("cold") after 64 MB were read; then whole steps of greedy generation, for one sequence
and for several at once. What both sides compute is compared first.
"""

from __future__ import annotations

import argparse

import torch
from timing import after_reading, interleaved, machine, row
from torch.nn import functional as F

from pygpt import GPT, GPTConfig, generate, ops

MATRICES = [(128, 384), (384, 1152), (768, 2304), (3072, 768), (768, 50257)]  # width in, out
MODELS = {
    "0.8M characters": GPTConfig(65, 64, 128, 4, 4, drop_rate=0.0),
    "14M": GPTConfig(8192, 256, 384, 6, 6, drop_rate=0.0),
    "gpt2 124M": GPTConfig.preset("gpt2"),
}
DTYPES = (torch.float32, torch.bfloat16)
PROMPT, TOKENS = 8, 24


def layers() -> None:
    widths = (34, 10, 10, 8, 10, 10, 8, 8)
    heads = ("linear layer", "us", "torch", "ratio", "cold us", "torch", "ratio", "GB/s")
    row(heads, widths)
    for dtype in DTYPES:
        for depth, cols in MATRICES:
            for rows in (1, 4, 16):
                x, weight = (
                    torch.randn(rows, depth, dtype=dtype),
                    torch.randn(cols, depth).to(dtype),
                )
                exact = F.linear(x.double(), weight.double())
                errors = [(f(x, weight) - exact).abs().max() for f in (ops.linear, F.linear)]
                slack = torch.finfo(dtype).eps * exact.abs().max()
                assert errors[0] <= 2 * errors[1] + slack, errors
                calls = [lambda x=x, w=weight, f=f: f(x, w) for f in (ops.linear, F.linear)]
                warm = interleaved(calls, 0.1)
                cold = after_reading(calls, 25)
                cells = [f"{rows} x {depth} -> {cols}, {str(dtype)[6:]}"]
                for ours, theirs in (warm, cold):
                    cells += [f"{ours * 1e6:.0f}", f"{theirs * 1e6:.0f}", f"{theirs / ours:.2f}"]
                row((*cells, f"{weight.nbytes / cold[0] / 1e9:.0f}"), widths)


def steps() -> None:
    widths = (34, 10, 10, 8)
    row(("ms a step of generation", "pygpt", "torch", "ratio"), widths)
    for name, config in MODELS.items():
        for dtype in DTYPES:
            model = GPT(config).to(dtype).eval()
            for batch in (1, 4, 16):
                prompts = torch.randint(0, config.vocab_size, (batch, PROMPT)).tolist()

                def ours(model=model, prompts=prompts):
                    return generate(model, prompts, TOKENS, temperature=0.0)

                def theirs(ours=ours):
                    with ops.backend("torch"):
                        return ours()

                logits = model(torch.tensor(prompts)).float()
                with ops.backend("torch"):
                    difference = (logits - model(torch.tensor(prompts)).float()).abs().max()
                assert difference <= 8 * torch.finfo(dtype).eps * logits.abs().max(), difference
                times = [t / TOKENS * 1e3 for t in interleaved([ours, theirs], 1.5)]
                label = f"{name}, {str(dtype)[6:]}, batch {batch}"
                row((label, *(f"{t:.2f}" for t in times), f"{times[1] / times[0]:.2f}"), widths)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine())
    torch.manual_seed(0)
    with torch.no_grad():
        layers()
        steps()


if __name__ == "__main__":
    main()
