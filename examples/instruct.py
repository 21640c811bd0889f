"""Teach a model to follow instructions, then give it one.

    python examples/instruct.py MODEL DATA OUT [STEPS]

MODEL is "gpt2-medium" or a model's folder, DATA a list of {"instruction", "input", "output"} (json,
jsonl), OUT the folder of the run. `pygpt.finetune.InstructModel.load(OUT)` gives the model back.
"""

import sys
from pathlib import Path

import pygpt


def main(name: str, data: str, out: str, steps: str = "230") -> None:
    model = pygpt.GPT.from_pretrained(name)
    if Path(name).exists():
        tok = pygpt.Tokenizer.from_file(name)
    else:
        tok = pygpt.Tokenizer.from_pretrained("gpt2")

    def show(event):
        if event.kind == "eval":
            print(f"step {event.step}: validation loss {event.values['val_loss']:.3f}")
        elif event.kind == "sample":
            print(event.values["sample"])

    config = pygpt.TrainConfig(
        steps=int(steps), batch_size=8, lr=5e-5, eval_every=50, sample_every=100
    )
    chat = pygpt.finetune.instruct(model, tok, data, config, out=out, on_event=show)

    print(chat.report(Path(out) / "test.jsonl", max_new_tokens=64))
    print(chat.reply("Rewrite the sentence in the past tense.", "She walks to the river."))


if __name__ == "__main__":
    main(*sys.argv[1:])
