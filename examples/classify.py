"""Teach a model to sort texts into classes, then ask it.

    python examples/classify.py MODEL DATA OUT [STEPS]

MODEL is "gpt2" or a model's folder, DATA a table with columns `text` and `label` (csv, tsv, jsonl),
OUT the folder of the run. `pygpt.finetune.Classifier.load(OUT)` gives the classifier back.
"""

import sys
from pathlib import Path

import pygpt


def main(name: str, data: str, out: str, steps: str = "300") -> None:
    model = pygpt.GPT.from_pretrained(name)
    if Path(name).exists():
        tok = pygpt.Tokenizer.from_file(name)
    else:
        tok = pygpt.Tokenizer.from_pretrained(name)

    def show(event):
        if event.kind == "eval":
            figures = event.values
            print(f"step {event.step}: {figures['val_accuracy']:.1%} right on validation texts")

    config = pygpt.TrainConfig(steps=int(steps), batch_size=8, lr=5e-5, eval_every=100)
    clf = pygpt.finetune.classify(model, tok, data, config, out=out, on_event=show)

    print(clf.report(Path(out) / "test.jsonl"))
    for text in ("You won a prize! Call now to claim it.", "I am late, start without me"):
        print(f"{text!r} is {clf.predict([text])[0]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
