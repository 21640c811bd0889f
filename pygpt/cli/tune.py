"""Verbs that fine-tune: finetune classify, instruct, prefer."""

from __future__ import annotations

import dataclasses
import json as json_module
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from pygpt import finetune
from pygpt.cli.display import TrainingDisplay
from pygpt.cli.folders import load_model, model_folder
from pygpt.config import LoRAConfig, TrainConfig
from pygpt.errors import UsageError
from pygpt.finetune.records import balance
from pygpt.training import choose_device

# The book's settings, which suit a pretrained GPT-2; a small model learns faster with more.
BOOK = TrainConfig(steps=500, batch_size=8, lr=5e-5, eval_every=100)
BOOK_PREFERENCES = dataclasses.replace(BOOK, lr=5e-6)


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
    lora_rank: int = 0,
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
        lora_rank: Learn low-rank additions of this rank to the blocks' matrices; 0 learns the
            matrices themselves.
        json: Print events, then the report, as JSON lines.
    """
    gpt, tok = load_model(model, "pretrain", train.device)
    source = _parts(texts, validation, test)
    if epochs is not None:
        rows = finetune.read_labelled(texts)
        rows = balance(rows, train.seed) if balanced else rows
        train = _for_epochs(train, epochs, len(rows), 0.7 if source is texts else 1.0)
    with TrainingDisplay(as_json=json, head_dim=gpt.config.head_dim) as display:
        classifier = finetune.classify(
            gpt,
            tok,
            source,
            train,
            out=out,
            trains=trains,
            balanced=balanced,
            lora=_lora(lora_rank),
            on_event=display,
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
    lora_rank: int = 0,
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
        lora_rank: Learn low-rank additions of this rank to the blocks' matrices; 0 learns the
            matrices themselves.
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
            lora=_lora(lora_rank),
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


def prefer(
    model: Positional[Path],
    pairs: Positional[Path],
    /,
    *,
    out: Path = Path("runs/prefer"),
    validation: Path | None = None,
    test: Path | None = None,
    beta: float = 0.1,
    train: OmitArgPrefixes[TrainConfig] = BOOK_PREFERENCES,
    epochs: int | None = None,
    lora_rank: int = 0,
    json: bool = False,
) -> int:
    """Teach an instructed model which of two answers people prefer (DPO).

    Example: pygpt finetune prefer runs/chat preferences.json --out runs/best --epochs 1

    Args:
        model: A folder made by finetune instruct.
        pairs: json or jsonl of objects with instruction, chosen, rejected and perhaps input.
        out: The run's folder.
        validation: Pairs for validation; if not given, a twentieth of the pairs.
        test: Pairs for the final report; if not given, a tenth of the pairs.
        beta: How dear it is to leave the model as it was.
        train: How it is trained.
        epochs: Passes over the training pairs, instead of --steps.
        lora_rank: Learn low-rank additions of this rank to the blocks' matrices; 0 learns the
            matrices themselves.
        json: Print events, then the report, as JSON lines.
    """
    device = str(choose_device(train.device))
    chat = finetune.InstructModel.load(model_folder(model, "instruct"), device=device)
    source = _parts(pairs, validation, test)
    if epochs is not None:
        rows = finetune.read_preferences(pairs)
        train = _for_epochs(train, epochs, len(rows), 0.85 if source is pairs else 1.0)
    with TrainingDisplay(as_json=json, head_dim=chat.model.config.head_dim) as display:
        finetune.prefer(
            chat,
            chat.tok,
            source,
            train,
            out=out,
            beta=beta,
            lora=_lora(lora_rank),
            on_event=display,
        )
    if not json:
        print(f"next: pygpt chat {out}")
    return 0


def _lora(rank: int) -> LoRAConfig | None:
    return LoRAConfig(rank=rank, alpha=float(rank)) if rank else None


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
