"""GPT-2 124M from safetensors: from_pretrained of pygpt and of transformers, warm page cache."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from timing import interleaved, machine, row

from pygpt import GPT, GPTConfig

IDS = torch.tensor([[464, 3797, 3332]])


def anonymous() -> int:
    """Bytes of memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


@torch.no_grad()
def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine(), "transformers", transformers.__version__)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    widths = (44, 10, 14, 8)
    row(("seconds", "pygpt", "transformers", "ratio"), widths)
    with tempfile.TemporaryDirectory() as scratch:
        own, plain = Path(scratch, "own"), Path(scratch, "plain")
        GPT(GPTConfig.preset("gpt2")).save_pretrained(own)
        transformers.GPT2LMHeadModel.from_pretrained(own).save_pretrained(plain)
        size = (plain / "model.safetensors").stat().st_size
        for folder, what in (
            (plain, "saved by transformers"),
            (own, "by pygpt, checksums verified"),
        ):
            loaders = (
                lambda folder=folder: GPT.from_pretrained(folder),
                lambda folder=folder: transformers.GPT2LMHeadModel.from_pretrained(folder).eval(),
            )
            ours, theirs = (loader() for loader in loaders)
            expected = theirs(IDS).logits
            assert (ours(IDS) - expected).abs().max() <= 2e-5 * expected.abs().max()
            del ours, theirs
            first = (lambda: loaders[0]()(IDS), lambda: loaders[1]()(IDS))  # noqa: B023
            for name, functions in ((what, loaders), (f"{what}, to first logits", first)):
                ours, theirs = interleaved(functions, 1.5)
                row((name, f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"), widths)
        before = anonymous()
        model = GPT.from_pretrained(plain)
        model(IDS)
        mapped = anonymous() - before
        model.train()
        print(
            f"anonymous memory: {mapped / size:.2f} of the file after logits, "
            f"{(anonymous() - before) / size:.2f} once train() was called"
        )


if __name__ == "__main__":
    main()
