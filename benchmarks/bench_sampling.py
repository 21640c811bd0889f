"""Sampling: pygpt against the sort-and-multinomial code everybody writes, and the Python twin."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from timing import interleaved, machine, row

from pygpt import ops

VOCAB = 50257
SETTINGS = {
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
}


def common(logits, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0):
    """What generation loops on the web do."""
    logits = logits / temperature
    if top_k:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return torch.multinomial(probabilities, 1)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine())
    torch.manual_seed(0)
    widths = (40, 10, 10, 10, 12, 8)
    row(("logits, settings", "pygpt us", "torch us", "ratio", "Python us", "ratio"), widths)
    for rows, dtype in ((1, torch.float32), (1, torch.bfloat16), (64, torch.float32)):
        logits = (torch.randn(rows, VOCAB) * 3).to(dtype)
        for name, settings in SETTINGS.items():
            settings = {"temperature": 0.8, **settings}
            uniforms = torch.rand(rows, dtype=torch.float64)
            few = logits[:2], uniforms[:2]
            ours, twin = (
                ops.sample(few[0], uniforms=few[1], impl=impl, **settings)
                for impl in ("native", "reference")
            )
            assert torch.equal(ours, twin), f"{name}: {ours} and {twin}"
            native, torchs = interleaved(
                [partial(ops.sample, logits, **settings), partial(common, logits, **settings)], 0.5
            )
            cells = [f"{rows} x {VOCAB} {str(dtype)[6:]}, {name}"]
            cells += [f"{native * 1e6:.0f}", f"{torchs * 1e6:.0f}", f"{torchs / native:.1f}"]
            if rows == 1:
                twin_call = partial(ops.sample, logits, impl="reference", **settings)
                (python,) = interleaved([twin_call], 0.1)
                cells += [f"{python * 1e6:.0f}", f"{python / native:.0f}"]
            else:
                cells += ["", ""]
            row(cells, widths)


if __name__ == "__main__":
    main()
