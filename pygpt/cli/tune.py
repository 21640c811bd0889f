"""Verbs that fine-tune: finetune classify, finetune instruct."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from pygpt import finetune
from pygpt.cli.display import TrainingDisplay
from pygpt.cli.folders import load_model
from pygpt.config import TrainConfig
from pygpt.errors import UsageError

# The book's settings, which suit a pretrained GPT-2; a small model learns faster with more.
BOOK = TrainConfig(steps=500, batch_size=8, lr=5e-5, eval_every=100)


def classify(
    model: Positional[str],
    texts: Positional[Path],
    /,
    *,
    out: Path = Path("runs/classify"),
    validation: Path | None = None,
    test: Path | None = None,
    trains: Literal["all", "last_block", "head"] = "all",
    balanced: bool = False,
    train: OmitArgPrefixes[TrainConfig] = BOOK,
    epochs: int | None = None,
    json: bool = False,
) -> int:
    """Teach a pretrained model to sort texts into classes.

    Example: pygpt finetune classify runs/pretrain spam.csv --out runs/spam --balanced --lr 1e-3

    Args:
        model: A run's or model's folder, or a name on the hub ("gpt2").
        texts: csv, tsv, jsonl or json with the columns label and text, or a folder with one folder
            of text files per class.
        out: The run's folder.
        validation: Texts for validation; if not given, a tenth of the texts.
        test: Texts for the final report; if not given, a fifth of the texts.
        trains: What learns: everything, the last block with the final norm, or only the head.
        balanced: Reduce every class to the size of the rarest.
        train: How it is trained.
        epochs: Passes over the training texts, instead of --steps.
        json: Print events, then the report, as JSON lines.
    """
    gpt, tok = load_model(model, "pretrain", train.device)
    source = _parts(texts, validation, test)
    if epochs is not None:
        rows = finetune.read_labelled(texts)
        rows = finetune.balance(rows, train.seed) if balanced else rows
        train = _for_epochs(train, epochs, len(rows), 0.7 if source is texts else 1.0)
    with TrainingDisplay(as_json=json, head_dim=gpt.config.head_dim) as display:
        classifier = finetune.classify(
            gpt, tok, source, train, out=out, trains=trains, balanced=balanced, on_event=display
        )
    report = out / "report.json"
    if json:
        print(report.read_text().strip() if report.exists() else "{}")
        return 0
    if report.exists():
        print(str(classifier.report(out / "test.jsonl")))
    print(f'next: pygpt predict {out} "a text to sort"')
    return 0


def instruct(
    model: Positional[str],
    tasks: Positional[Path],
    /,
    *,
    out: Path = Path("runs/instruct"),
    validation: Path | None = None,
    test: Path | None = None,
    template: Literal["alpaca", "phi", "short"] = "alpaca",
    mask_prompt: bool = True,
    train: OmitArgPrefixes[TrainConfig] = BOOK,
    epochs: int | None = None,
    json: bool = False,
) -> int:
    """Teach a pretrained model to follow instructions.

    Example: pygpt finetune instruct runs/pretrain tasks.json --out runs/chat --lr 1e-3 --epochs 3

    Args:
        model: A run's or model's folder, or a name on the hub ("gpt2").
        tasks: json or jsonl of objects with instruction, output and perhaps input.
        out: The run's folder.
        validation: Tasks for validation; if not given, a twentieth of the tasks.
        test: Tasks for the final report; if not given, a tenth of the tasks.
        template: How a task becomes a prompt; "short" leaves a small context to the task itself.
        mask_prompt: Learn the answers only, not the prompts.
        train: How it is trained.
        epochs: Passes over the training tasks, instead of --steps.
        json: Print events, then the report, as JSON lines.
    """
    gpt, tok = load_model(model, "pretrain", train.device)
    source = _parts(tasks, validation, test)
    if epochs is not None:
        rows = finetune.read_instructions(tasks)
        train = _for_epochs(train, epochs, len(rows), 0.85 if source is tasks else 1.0)
    with TrainingDisplay(as_json=json, head_dim=gpt.config.head_dim) as display:
        chat = finetune.instruct(
            gpt,
            tok,
            source,
            train,
            out=out,
            template=template,
            mask_prompt=mask_prompt,
            on_event=display,
        )
    if (out / "test.jsonl").exists():
        figures = chat.report(out / "test.jsonl")
        if json:
            print(json_module.dumps(figures))
        else:
            said = f"{figures['exact_match']:.1%} exact, loss {figures['loss']:.3f}"
            print(f"{figures['tasks']} held-out tasks: {said}")
    if not json:
        print(f"next: pygpt chat {out}")
    return 0


def _parts(data: Path, validation: Path | None, test: Path | None) -> Any:
    if validation is None:
        if test is not None:
            raise UsageError("--test needs --validation: give both, or neither for a split")
        return data
    return {"train": data, "validation": validation, **({"test": test} if test else {})}


def _for_epochs(train: TrainConfig, epochs: int, rows: int, share: float) -> TrainConfig:
    if epochs < 1:
        raise UsageError(f"--epochs must be at least 1, got {epochs}")
    steps = max(1, int(epochs * share * rows / train.batch_size))
    return dataclasses.replace(train, steps=steps)
