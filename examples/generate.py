"""Continue a prompt with a trained model: python examples/generate.py runs/book "It was" """

import argparse
from pathlib import Path

import pygpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=50)
    args = parser.parse_args()

    model = pygpt.GPT.from_pretrained(args.run / "model")
    tok = pygpt.Tokenizer.from_file(args.run / "model")
    print(args.prompt, end="")
    pieces = pygpt.stream(
        model, tok, args.prompt, max_new_tokens=args.tokens, temperature=0.8, top_k=40, seed=1
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
