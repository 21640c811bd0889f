"""Verbs that use a model: generate, chat, predict, eval."""

from __future__ import annotations

import itertools
import json as json_module
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

import pygpt
from pygpt.cli.folders import load_model, model_folder
from pygpt.finetune import Classifier, InstructModel
from pygpt.training import choose_device

BATCH = 256  # texts that predict reads before it answers


def generate(
    model: Positional[str],
    prompt: Positional[str] = "",
    /,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str = "",
    seed: int | None = None,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Continue a prompt.

    Example: pygpt generate runs/pretrain "Every effort moves you" --temperature 0.7 --seed 1

    Args:
        model: A run's or model's folder, or a name on the hub ("gpt2").
        prompt: The text to continue; "-" reads it from standard input.
        max_new_tokens: At most so many tokens.
        temperature: 0 always takes the likeliest token; 1 samples from the model as it is.
        top_k: Sample from the k likeliest tokens only; 0 for all.
        top_p: Sample from the likeliest tokens that together have this probability.
        min_p: Leave out tokens with less than this share of the likeliest one's probability.
        repetition_penalty: Above 1, tokens that were there become less likely.
        stop: End before this text.
        seed: The same seed gives the same text.
        device: auto, cpu, cuda or mps.
        json: Print one JSON object instead of streaming.
    """
    gpt, tok = load_model(model, "pretrain", device)
    if prompt == "-":
        prompt = sys.stdin.read()
    pieces = pygpt.stream(
        gpt,
        tok,
        prompt,
        max_new_tokens,
        stop=[stop] if stop else (),
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if json:
        print(json_module.dumps({"prompt": prompt, "continuation": "".join(pieces)}))
    else:
        _print_pieces([prompt] if prompt else [], pieces)
    return 0


def chat(
    model: Positional[Path],
    /,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int | None = None,
    device: str = "auto",
) -> int:
    """Give instructions to a fine-tuned model, one a line.

    Example: pygpt chat runs/demo

    Ends with an empty line, Ctrl-D or Ctrl-C. A line may hold an instruction and its input with
    " | " between.

    Args:
        model: A folder made by finetune instruct, or one of several runs that holds it.
        temperature: 0 always takes the likeliest token.
        max_new_tokens: At most so many tokens an answer.
        seed: The same seed gives the same answers.
        device: auto, cpu, cuda or mps.
    """
    folder = model_folder(model, "instruct")
    talker = InstructModel.load(folder, device=str(choose_device(device)))
    if sys.stdin.isatty():
        print(_greeting(folder))
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line.strip():
            return 0
        instruction, _, given = line.partition(" | ")
        try:
            pieces = talker.stream(
                instruction.strip(),
                given.strip(),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                **({} if seed is None else {"seed": seed}),
            )
            _print_pieces([], pieces)
        except ValueError as error:  # too long for the context: the talk goes on
            print(f"pygpt: {error}", file=sys.stderr)


def predict(
    model: Positional[Path],
    texts: Positional[tuple[str, ...]] = (),
    /,
    *,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Sort texts into classes, one label a line.

    Example: pygpt predict runs/spam "You won a prize, call now"

    Without texts, each line of standard input is one.

    Args:
        model: A folder made by finetune classify, or one of several runs that holds it.
        texts: The texts; none reads standard input.
        device: auto, cpu, cuda or mps.
        json: Print one JSON object a text, with the probability of every label.
    """
    folder = model_folder(model, "classify")
    classifier = Classifier.load(folder, device=str(choose_device(device)))
    for batch in _batches(texts or (line.rstrip("\n") for line in sys.stdin)):
        chances = classifier.probabilities(batch)
        for text, row in zip(batch, chances.tolist(), strict=True):
            label = classifier.labels[max(range(len(row)), key=row.__getitem__)]
            if json:
                shares = dict(zip(classifier.labels, row, strict=True))
                print(json_module.dumps({"text": text, "label": label, "probabilities": shares}))
            else:
                print(label)
    return 0


def evaluate(
    model: Positional[str],
    kind: Positional[Literal["text", "classification", "instruction"]],
    data: Positional[Path],
    /,
    *,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Measure a model on text, labelled texts or instructions.

    Example: pygpt eval runs/pretrain text held-out.txt

    Args:
        model: A run's or model's folder; for text also a name on the hub.
        kind: What the data is.
        data: The file or folder to measure on.
        device: auto, cpu, cuda or mps.
        json: Print one JSON object.
    """
    if not data.exists():
        raise FileNotFoundError(f"{data}: no such file or folder")
    place = str(choose_device(device))
    if kind == "text":
        gpt, tok = load_model(model, "pretrain", device)
        figures = pygpt.evaluate(gpt, tok, kind, data)
    elif kind == "classification":
        folder = model_folder(Path(model), "classify")
        figures = pygpt.evaluate(Classifier.load(folder, device=place), None, kind, data)
    else:
        folder = model_folder(Path(model), "instruct")
        figures = pygpt.evaluate(InstructModel.load(folder, device=place), None, kind, data)
    if json:
        print(json_module.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    return 0


def _greeting(folder: Path) -> str:
    """What the model says it can do: the instructions that its run folder lists, if it does."""
    path = folder.parent / "instructions.json"
    if not path.exists():
        return "Give an instruction; an empty line ends."
    known: list[dict[str, str]] = json_module.loads(path.read_text())
    shown = "\n".join(f"  {task['instruction']} | {task['input']}" for task in known)
    return f"I was taught these instructions; give one, with your own words after the bar:\n{shown}"


def _print_pieces(first: Iterable[str], pieces: Iterator[str]) -> None:
    for piece in itertools.chain(first, pieces):
        print(piece, end="", flush=True)
    print()


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
