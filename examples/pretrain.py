"""Pretrain a small GPT on a text file: python examples/pretrain.py book.txt runs/book"""

import argparse
from pathlib import Path

import pygpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()

    tok = pygpt.Tokenizer.train([args.text.read_text()], vocab_size=1024)
    data = pygpt.data.prepare([args.text], tok, args.out / "data")
    model = pygpt.GPT(
        pygpt.GPTConfig(
            vocab_size=tok.n_vocab,
            context_length=128,
            emb_dim=128,
            n_heads=4,
            n_layers=4,
            drop_rate=0.0,
            tie_weights=True,
        )
    )
    print(model)
    config = pygpt.TrainConfig(steps=args.steps, batch_size=16, lr=2e-3, eval_every=100)
    run = pygpt.pretrain(model, data, config, out=args.out)
    for entry in run.metrics:
        if "val_loss" in entry:
            print(f"step {entry['step']:5d}  validation loss {entry['val_loss']:.3f}")


if __name__ == "__main__":
    main()
